"""The component `udm` of the command line: weights for the rows of a source, kept in the artifact cache."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from bco_lab.cache import Artifact, ArtifactCache, ArtifactKey, digest_of
from bco_lab.data.sources import FeedbackData
from bco_lab.data.weights import WEIGHT
from bco_lab.density_ratio import TARGETS, WeightSummary, matching_ratio, matching_weights
from bco_lab.embedding import Embedded
from bco_lab.prompt_classifier import FOLDS, STRENGTHS, UdmDiagnostics, UdmFit, fit_density_ratio
from bco_lab.udm import PromptMatching, UdmReport, match_prompts, prompt_texts

logger = logging.getLogger(__name__)

EMBEDDINGS_VERSION, FIT_VERSION = 1, 1  # raise one where the code behind it changes its numbers
_WEIGHED = {"desirable": "undesirable rows", "undesirable": "desirable rows", "mixture": "rows"}
P_BINS, WEIGHT_BINS_PER_DECADE = 20, 8


@dataclass(frozen=True)
class MatchingReport:
    """What matching found in a run's rows and what it did to them.

    Attributes:
        udm: Classifier, weights of the training rows and recommendation.
        settings: Bounds, target, normalisation, sample size, seed.
        scale: What all weights of weighed rows were divided by; 1 without `normalize`.
        prompts: Different prompts embedded, evaluation rows included.
        truncated: Prompts longer than the embedder's limit; None where it does not say.
        dim: Entries of an embedding.
        p_histogram: Counts of training rows by p(desirable | prompt): `edges`, `desirable`, `undesirable`.
        weight_histogram: Counts of weighed training rows by weight, before clamping and after: `edges`, `ratio`,
            `weight`.
    """

    udm: UdmReport
    settings: dict[str, Any]
    scale: float
    prompts: int
    truncated: int | None
    dim: int
    p_histogram: dict[str, list[float]]
    weight_histogram: dict[str, list[float]]

    def notes(self) -> list[str]:
        """What a user should read, a sentence each."""
        weights = self.udm.weights
        found = [self.udm.recommendation]
        if self.udm.diagnostics.auc is not None:
            found.append(
                f"{weights.rows} rows weigh {weights.mean / self.scale:.2f} on average; "
                f"{weights.share_below_min:.0%} were clamped from below, {weights.share_above_max:.0%} from above."
            )
        if self.truncated:
            found.append(f"{self.truncated} of {self.prompts} prompts were cut to the embedder's limit.")
        return found

    def figures(self) -> dict[str, float | None]:
        """The figures to compare runs by."""
        found, weights = self.udm.diagnostics, self.udm.weights
        return {
            "auc": found.auc,
            "auc_low": found.auc_low,
            "auc_high": found.auc_high,
            "weight_mean": weights.mean / self.scale,
            "ess": weights.effective_sample_size,
            "share_below_min": weights.share_below_min,
            "share_above_max": weights.share_above_max,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **self.udm.to_dict(),
            "settings": self.settings,
            "scale": self.scale,
            "mean_after_scaling": self.udm.weights.mean / self.scale,
            "prompts": self.prompts,
            "truncated_prompts": self.truncated,
            "dim": self.dim,
            "p_histogram": self.p_histogram,
            "weight_histogram": self.weight_histogram,
        }


@dataclass(frozen=True)
class NoMatching:
    """Matching switched off: every example keeps the weight it came with, 1 where it has none.

    Args:
        min_density_ratio: Lower clamp of the ratio, for a log that brings `p_desirable` itself; applied where rows are
            tokenised.
        max_density_ratio: Upper clamp.
    """

    min_density_ratio: float = 0.5
    max_density_ratio: float = 10.0

    def __post_init__(self) -> None:
        _check_bounds(self.min_density_ratio, self.max_density_ratio)

    def weigh(self, data: FeedbackData, cache: ArtifactCache) -> tuple[FeedbackData, MatchingReport | None]:
        """The data as they are."""
        return data, None


@dataclass(frozen=True)
class DistributionMatching:
    """Underlying distribution matching (arXiv 2404.04656, section 4.3), before training.

    Prompts are embedded once and told apart by a cross-fitted classifier; both go through the cache, so changing the
    bounds, `target` or `normalize` computes neither again.

    Args:
        embedder: Texts to embeddings `[prompts, dim]`: one of bco_lab.embedders, or any callable. Embeddings of one
            without a `fingerprint()` are computed in every run.
        min_density_ratio: Lower clamp of the ratio.
        max_density_ratio: Upper clamp.
        prompt_sample_size: Rows per class, at most, that a classifier is fitted on.
        target: The distribution that rows are drawn to (see `matching_ratio`): `desirable`, `undesirable`, `mixture`.
        normalize: Divide the weights by their mean over the weighed training rows, so that matching does not change
            the effective learning rate.
        seed: Of folds and samples.

    Raises:
        ValueError: A setting that breaks a rule.
    """

    embedder: Callable[[Sequence[str]], Any]
    min_density_ratio: float = 0.5
    max_density_ratio: float = 10.0
    prompt_sample_size: int = 1024
    target: str = "desirable"
    normalize: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_bounds(self.min_density_ratio, self.max_density_ratio)
        if not callable(self.embedder):
            raise ValueError(f"embedder={self.embedder} must be callable: texts to embeddings, [prompts, dim]")
        for key, least in (("prompt_sample_size", 2), ("seed", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{key}={value} must be a whole number >= {least}")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize={self.normalize} must be true or false")
        if self.target not in TARGETS:
            raise ValueError(f"target={self.target} must be one of {', '.join(TARGETS)}")

    def weigh(self, data: FeedbackData, cache: ArtifactCache) -> tuple[FeedbackData, MatchingReport]:
        """The data with a column `example_weight`, and what was found.

        Raises:
            ValueError: See `match_prompts`; or an embedder that does not return one finite embedding per prompt.
        """
        matching, embedded = self.match(data, cache)
        p = torch.from_numpy(matching.fit.p_desirable)
        labels = torch.from_numpy(matching.labels)
        weights, summary = matching_weights(p, labels, self.min_density_ratio, self.max_density_ratio, self.target)
        scale = summary.mean if self.normalize else 1.0
        train = _with_weights(data.train, weights, matching_ratio(p, labels, self.target)[1], scale)
        held_out = None if data.eval is None else self._weigh_others(data.eval, matching, embedded, scale)
        report = self._report(matching, embedded, summary, scale)
        return replace(data, train=train, eval=held_out), report

    def match(self, data: FeedbackData, cache: ArtifactCache) -> tuple[PromptMatching, "EmbeddedPrompts"]:
        """Embeddings of all prompts and cross-fitted probabilities of the training rows, from the cache if there."""
        train = prompt_texts(data.train, data.name)
        held_out = [] if data.eval is None else prompt_texts(data.eval, data.name)
        # All in one call: an embedder may learn from the prompts (not from labels), and embeddings that do not depend
        # on the split are good for other splits too.
        embedded = self._embed(sorted({*train, *held_out}), cache)
        matching = match_prompts(
            data.train,
            embedded.of,
            prompt_sample_size=self.prompt_sample_size,
            seed=self.seed,
            name=data.name,
            fit=lambda *arguments, **options: _fit(cache, *arguments, **options),
        )
        return matching, embedded

    def _embed(self, prompts: list[str], cache: ArtifactCache) -> "EmbeddedPrompts":
        fingerprint = getattr(self.embedder, "fingerprint", None)
        if fingerprint is None:
            logger.info("The embedder has no fingerprint(), so its embeddings are not kept for other runs")
            return self._call_embedder(prompts)
        parts = {"embedder": fingerprint(), "prompts": digest_of(*prompts), "count": len(prompts)}
        key = ArtifactKey("prompt-embeddings", EMBEDDINGS_VERSION, parts)

        def compute() -> Artifact:
            found = self._call_embedder(prompts)
            return Artifact({"values": found.values}, {"truncated": found.truncated})

        artifact = cache.get_or_compute(key, compute)
        return EmbeddedPrompts(prompts, artifact.arrays["values"], artifact.facts["truncated"])

    def _call_embedder(self, prompts: list[str]) -> "EmbeddedPrompts":
        method = getattr(self.embedder, "embed", self.embedder)
        try:
            found = method(prompts)
        except (ValueError, OSError, ImportError):
            raise
        except Exception as error:  # somebody else's code
            raise ValueError(f"the embedder failed: {type(error).__name__}: {error}") from error
        values, truncated = (found.values, found.truncated) if isinstance(found, Embedded) else (found, None)
        return EmbeddedPrompts(prompts, _checked(values, prompts), truncated)

    def _weigh_others(
        self, rows: Dataset, matching: PromptMatching, embedded: "EmbeddedPrompts", scale: float
    ) -> Dataset:
        p = torch.tensor(matching.predict(rows, embedded.of, name="eval"), dtype=torch.float64)
        ratio, weighed = matching_ratio(p, torch.tensor(rows["label"]), self.target)
        weights = torch.clamp(ratio, self.min_density_ratio, self.max_density_ratio)
        return _with_weights(rows, weights, weighed, scale)

    def _report(
        self, matching: PromptMatching, embedded: "EmbeddedPrompts", summary: WeightSummary, scale: float
    ) -> MatchingReport:
        p, labels = matching.fit.p_desirable, matching.labels
        ratio, weighed = matching_ratio(torch.from_numpy(p), torch.from_numpy(labels), self.target)
        return MatchingReport(
            udm=UdmReport(matching.fit.diagnostics, summary, _WEIGHED[self.target]),
            settings={
                "min_density_ratio": self.min_density_ratio,
                "max_density_ratio": self.max_density_ratio,
                "prompt_sample_size": self.prompt_sample_size,
                "target": self.target,
                "normalize": self.normalize,
                "seed": self.seed,
            },
            scale=scale,
            prompts=len(embedded.prompts),
            truncated=embedded.truncated,
            dim=embedded.values.shape[1],
            p_histogram=_p_histogram(p, labels),
            weight_histogram=_weight_histogram(
                ratio[weighed].numpy(), self.min_density_ratio, self.max_density_ratio, scale
            ),
        )


@dataclass(frozen=True, eq=False)
class EmbeddedPrompts:
    """Embeddings by prompt.

    Attributes:
        prompts: Different texts.
        values: `[prompts, dim]`.
        truncated: How many of them the embedder cut; None where it does not say.
    """

    prompts: Sequence[str]
    values: NDArray[np.floating[Any]]
    truncated: int | None

    def of(self, prompts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """Embeddings of these prompts, `[prompts, dim]`."""
        place = {prompt: number for number, prompt in enumerate(self.prompts)}
        return self.values[[place[prompt] for prompt in prompts]]


def _check_bounds(least: float, most: float) -> None:
    for key, value in (("min_density_ratio", least), ("max_density_ratio", most)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key}={value} must be a number")
    if not 0 < least <= most < float("inf"):
        raise ValueError(f"min_density_ratio={least} must be in (0, udm.max_density_ratio={most}]")


def _checked(values: Any, prompts: Sequence[str]) -> NDArray[np.floating[Any]]:
    try:
        found = np.asarray(values.detach().float().cpu() if isinstance(values, torch.Tensor) else values)
        found = found if found.dtype.kind == "f" else found.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the embedder returned no numbers [prompts, dim]: {error}") from error
    if found.ndim != 2 or len(found) != len(prompts) or not found.shape[1]:
        raise ValueError(
            f"the embedder returned the shape {list(found.shape)} for {len(prompts)} prompts; it must return one "
            "embedding per prompt, [prompts, dim]"
        )
    finite = np.isfinite(found).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"the embedder returned a value that is not finite for {prompts[int(np.argmin(finite))][:80]!r}"
        )
    largest = float(np.abs(found).max())
    # The classifier squares them; where that would leave the range of numbers, their common scale goes.
    return found / largest if largest and not 1e-15 < largest < 1e15 else found


def _fit(cache: ArtifactCache, embeddings: Any, labels: Any, groups: Any, **options: Any) -> UdmFit:
    """`fit_density_ratio` behind the cache."""
    content = digest_of(np.asarray(embeddings), np.asarray(labels), np.asarray(groups))
    key = ArtifactKey("p-desirable", FIT_VERSION, {"rows": content, "folds": FOLDS, "strengths": STRENGTHS, **options})

    def compute() -> Artifact:
        fit = fit_density_ratio(embeddings, labels, groups, **options)
        arrays = {"p": fit.p_desirable, "coefficients": fit.coefficients, "intercept": np.array([fit.intercept])}
        return Artifact(arrays, fit.diagnostics.to_dict())

    kept = cache.get_or_compute(key, compute)
    known = {name: kept.facts[name] for name in inspect.signature(UdmDiagnostics).parameters}
    return UdmFit(
        kept.arrays["p"], kept.arrays["coefficients"], float(kept.arrays["intercept"][0]), UdmDiagnostics(**known)
    )


def _with_weights(rows: Dataset, weights: torch.Tensor, weighed: torch.Tensor, scale: float) -> Dataset:
    column = torch.where(weighed, weights / scale, 1.0)
    return rows.add_column(WEIGHT, column.tolist())


def _p_histogram(p: NDArray[Any], labels: NDArray[np.bool_]) -> dict[str, list[float]]:
    edges = np.linspace(0.0, 1.0, P_BINS + 1)
    counts = {name: np.histogram(p[labels == label], edges)[0] for name, label in _CLASSES.items()}
    return {"edges": edges.tolist(), **{name: count.tolist() for name, count in counts.items()}}


_CLASSES: Mapping[str, bool] = {"desirable": True, "undesirable": False}


def _weight_histogram(ratio: NDArray[Any], least: float, most: float, scale: float) -> dict[str, list[float]]:
    """Logarithmic bins over two decades around the bounds; ratios beyond fall into the outermost."""
    low, high = np.log10(least / scale) - 1, np.log10(most / scale) + 1
    edges = np.logspace(low, high, int(np.ceil((high - low) * WEIGHT_BINS_PER_DECADE)) + 1)
    inside = np.clip(ratio / scale, edges[0], edges[-1])
    clamped = np.clip(np.clip(ratio, least, most) / scale, edges[0], edges[-1])
    counts = {"ratio": np.histogram(inside, edges)[0], "weight": np.histogram(clamped, edges)[0]}
    return {"edges": edges.tolist(), **{name: count.tolist() for name, count in counts.items()}}
