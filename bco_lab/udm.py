"""Underlying distribution matching (arXiv 2404.04656, section 4.3): what weighs the examples before training.

Where thumbs-up and thumbs-down come from different prompts, undesirable rows are weighed by how much more their prompt
belongs to the desirable class. The weights are fixed before the first step: this module adds the probabilities behind
them as a column.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from bco_lab.data.chat import check_text
from bco_lab.data.labels import check_both_classes, parse_label
from bco_lab.data.weights import PROBABILITY, WEIGHT
from bco_lab.density_ratio import WeightSummary, summarize_weights
from bco_lab.embedding import Embedder, EmbeddingFunction, embed_prompts, raw_prompt_text
from bco_lab.prompt_classifier import Bools, UdmDiagnostics, UdmFit, fit_density_ratio

_CANNOT_SAY = 0.65  # an interval from chance to here or beyond leaves open whether there is anything to match


@dataclass(frozen=True)
class UdmReport:
    """What matching found and what it does to the undesirable rows.

    Attributes:
        diagnostics: Of the classifier.
        weights: Of the training rows that are weighed, under the bounds asked for.
        weighed: Which these are: "undesirable" rows unless another target was asked for.
    """

    diagnostics: UdmDiagnostics
    weights: WeightSummary
    weighed: str = "undesirable rows"

    @property
    def recommendation(self) -> str:
        """Whether matching is indicated, and why, in a sentence."""
        found = self.diagnostics
        if found.auc is None or found.auc_low is None or found.auc_high is None:
            return f"UDM is not indicated because it does nothing here, all weights are equal: {found.reason}."
        how_far = f"held-out AUC {found.auc:.2f}, 95% interval {found.auc_low:.2f} to {found.auc_high:.2f}"
        if found.auc_low <= 0.5 and found.auc_high > _CANNOT_SAY:
            return (
                f"UDM is not indicated because {found.prompts:,} prompts are too few to say whether those of both "
                f"classes differ ({how_far})."
            )
        if found.auc_low <= 0.5:
            return f"UDM is not indicated because the prompts of both classes cannot be told apart ({how_far})."
        share = self.weights.effective_sample_size / self.weights.rows
        at_bound = self.weights.share_below_min
        return (
            f"UDM is indicated because desirable and undesirable rows come from different prompts ({how_far}). "
            f"The weighted {self.weighed} are worth {share:.0%} of their number."
        ) + (
            f" The lower bound raises the weight of {at_bound:.0%} of them, which keeps most of the difference: lower "
            "min_density_ratio."
            if at_bound > 0.5
            else ""
        )

    def to_dict(self) -> dict[str, Any]:
        """Diagnostics, weights and recommendation, for JSON."""
        return {
            "classifier": self.diagnostics.to_dict(),
            "weights": self.weights.to_dict(),
            "recommendation": self.recommendation,
        }


@dataclass(frozen=True, eq=False)
class PromptMatching:
    """Probabilities of training rows, and what gives other rows theirs.

    Attributes:
        fit: Of the training rows, in their order.
        labels: Of the training rows, `[rows]`.
        known: Held-out probability of each training prompt, by its text.
    """

    fit: UdmFit
    labels: Bools
    known: Mapping[str, float]

    @property
    def p_desirable(self) -> list[float]:
        """`p(desirable | prompt)` of each training row, held out."""
        return self.fit.p_desirable.tolist()

    def predict(self, dataset: Dataset, embed: Embedder, *, name: str) -> list[float]:
        """`p(desirable | prompt)` of rows that were not fitted on, such as evaluation rows; their labels play no part.

        A prompt that training rows have too keeps its held-out probability; others are judged by the final classifier.

        Args:
            dataset: Rows with a `prompt`.
            embed: What embedded the training prompts.
            name: What errors call the data set.

        Raises:
            ValueError: See `match_prompts`.
        """
        prompts = prompt_texts(dataset, name)
        new = sorted(set(prompts) - set(self.known))
        judged = dict(zip(new, self.fit.predict(embed(new)).tolist(), strict=True)) if new else {}
        return [self.known[prompt] if prompt in self.known else judged[prompt] for prompt in prompts]

    def report(self, *, min_density_ratio: float, max_density_ratio: float) -> UdmReport:
        """What the bounds make of the probabilities; nothing is fitted again."""
        undesirable = torch.from_numpy(self.fit.p_desirable[~self.labels])
        return UdmReport(self.fit.diagnostics, summarize_weights(undesirable, min_density_ratio, max_density_ratio))


def match_prompts(
    dataset: Dataset | IterableDataset,
    embed: Embedder,
    *,
    prompt_sample_size: int,
    seed: int,
    name: str,
    fit: Callable[..., UdmFit] = fit_density_ratio,
) -> PromptMatching:
    """Embed each different prompt once and cross-fit `p(desirable | prompt)`.

    The result is the same on every process that computes it, and does not depend on the order of the rows.

    Args:
        dataset: Rows with a `prompt` (a string or messages) and a `label`.
        embed: Prompts to embeddings; called once, with each different text once.
        prompt_sample_size: Rows per class, at most, that a classifier is fitted on.
        seed: Of folds and samples.
        name: What errors call the data set.
        fit: What fits, with the arguments of `fit_density_ratio`; a cache may stand in front of that.

    Raises:
        ValueError: A stream, a column of weights or probabilities that is there already, no prompts, labels of one
            class only, or a row that breaks a rule; the message names data set, row and column.
    """
    prompts = prompt_texts(dataset, name)
    labels = np.array(_labels(dataset, name))
    unique = sorted(set(prompts))
    place_of = {prompt: place for place, prompt in enumerate(unique)}
    places = np.array([place_of[prompt] for prompt in prompts])
    embeddings = np.asarray(embed(unique))
    if embeddings.ndim != 2 or len(embeddings) != len(unique):
        raise ValueError(
            f"the embedder returned the shape {list(embeddings.shape)} for {len(unique)} prompts, not [prompts, dim]"
        )
    found = fit(embeddings[places], labels, places.tolist(), prompt_sample_size=prompt_sample_size, seed=seed)
    return PromptMatching(found, labels, dict(zip(prompts, found.p_desirable.tolist(), strict=True)))


def add_p_desirable(
    dataset: Dataset | IterableDataset,
    embedding_func: EmbeddingFunction,
    embedding_tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_sample_size: int,
    min_density_ratio: float,
    max_density_ratio: float,
    seed: int,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    name: str = "train",
) -> tuple[Dataset, UdmReport]:
    """Add the column `p_desirable` to training rows, from embeddings of their prompts.

    Args:
        dataset: See `match_prompts`.
        embedding_func: See `embed_prompts`.
        embedding_tokenizer: See `embed_prompts`.
        prompt_sample_size: See `match_prompts`.
        min_density_ratio: Lower clamp of the weights; only the report depends on it.
        max_density_ratio: Upper clamp of the weights; only the report depends on it.
        seed: Of folds and samples.
        batch_size: Prompts per call of `embedding_func`.
        device: Where its tensors are put.
        name: What errors call the data set.

    Returns:
        The rows with the column, and the report.

    Raises:
        ValueError: See `match_prompts` and `embed_prompts`.
    """
    embed = partial(
        embed_prompts,
        embedding_func=embedding_func,
        embedding_tokenizer=embedding_tokenizer,
        batch_size=batch_size,
        device=device,
    )
    matching = match_prompts(dataset, embed, prompt_sample_size=prompt_sample_size, seed=seed, name=name)
    report = matching.report(min_density_ratio=min_density_ratio, max_density_ratio=max_density_ratio)
    return dataset.add_column(PROBABILITY, matching.p_desirable), report


# ---- rows ----


def prompt_texts(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    """What is embedded of each row (see `raw_prompt_text`).

    Raises:
        ValueError: See `match_prompts`.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name}: a stream cannot be matched, because all prompts must be seen before the first step: load it "
            f"whole (streaming=False), or bring a column {PROBABILITY!r} and switch matching off"
        )
    for column in (WEIGHT, PROBABILITY):
        if column in dataset.column_names:
            raise ValueError(
                f"{name}: the column {column!r} is there already and would win over matching: remove the column, or "
                "switch matching off (no embedding_func, udm=off)"
            )
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{name}: matching needs the column 'prompt'; there are {', '.join(dataset.column_names)}")
    texts = []
    for row, prompt in enumerate(dataset["prompt"]):
        try:
            check_text(prompt, "prompt")
        except ValueError as error:
            raise ValueError(f"{name}, row {row}, column 'prompt': {error}") from None
        texts.append(raw_prompt_text(prompt))
    return texts


def _labels(dataset: Dataset, name: str) -> list[bool]:
    labels = []
    for row, label in enumerate(dataset["label"]):
        try:
            labels.append(parse_label(label))
        except ValueError as error:
            raise ValueError(f"{name}, row {row}, column 'label': {error}") from None
    check_both_classes(labels, name)
    return labels
