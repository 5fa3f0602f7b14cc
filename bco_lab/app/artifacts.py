"""What trials of a sweep share: tokenised rows and reference log-probs, by the artifact cache."""

from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from bco_lab.cache import Artifact, ArtifactCache, ArtifactKey, digest_of
from bco_lab.config import BCOConfig
from bco_lab.data.tokenization import TokenizationReport, tokenize_dataset
from bco_lab.data.weights import WEIGHT, with_density_ratio
from bco_lab.identity import policy_identity, tokenizer_digest
from bco_lab.models import PolicySource
from bco_lab.reference import REF_LOGPS
from bco_lab.trainer import BCOTrainer

TOKENS_VERSION, REFERENCE_VERSION = 1, 1  # raise one where the code behind it changes its numbers

_TEXT_COLUMNS = ("prompt", "completion", "label", "example_id", "origin")


# ---- tokenised rows ----


def tokenized_rows(
    rows: Dataset, tokenizer: Any, args: BCOConfig, name: str, *, encoder_decoder: bool, cache: ArtifactCache
) -> tuple[Dataset, TokenizationReport]:
    """Rows as `tokenize_dataset` makes them, weights included, from the cache where they are known.

    Args:
        rows: Texts with `label`, `example_id` and maybe `p_desirable` or `example_weight`.
        tokenizer: The policy's.
        args: Limits and bounds.
        name: What errors call the rows.
        encoder_decoder: Whether the model is an encoder-decoder.
        cache: Where tokenised rows are kept, without their weights.

    Raises:
        ValueError: A row that breaks a rule; the message names it.
    """
    weighted = with_density_ratio(
        rows, min_density_ratio=args.min_density_ratio, max_density_ratio=args.max_density_ratio, name=name
    )
    texts = rows.select_columns([column for column in _TEXT_COLUMNS if column in rows.column_names])
    limits: dict[str, Any] = {
        "max_length": args.max_length,
        "max_completion_length": args.max_completion_length,
        "truncation": args.truncation,
        "encoder_decoder": encoder_decoder,
    }
    identity = {"tokenizer": tokenizer_digest(tokenizer), "template": tokenizer.chat_template, **_libraries()}
    key = ArtifactKey("tokens", TOKENS_VERSION, {"rows": _digest_of_texts(texts), **limits, **identity})

    def compute() -> Artifact:
        tokenised, report = tokenize_dataset(texts, tokenizer, num_proc=args.dataset_num_proc, name=name, **limits)
        assert report is not None
        return Artifact(_columns_of(tokenised), vars(report))

    artifact = cache.get_or_compute(key, compute)
    tokenised = _rows_of(artifact)
    if WEIGHT in weighted.column_names:
        weight_of = dict(zip(weighted["example_id"], weighted[WEIGHT], strict=True))
        tokenised = tokenised.add_column(WEIGHT, [weight_of[each] for each in tokenised["example_id"]])
    return tokenised, TokenizationReport(**artifact.facts)


def _digest_of_texts(texts: Dataset) -> str:
    """Of what is tokenised; where a row came from does not matter."""
    counted = [column for column in texts.column_names if column != "origin"]
    return digest_of(*(f"{column}={texts[column][:]!r}" for column in sorted(counted)))


def _columns_of(rows: Dataset) -> dict[str, NDArray[Any]]:
    """Token ids end to end, the number of tokens of each row, and the other columns."""
    ids = rows["input_ids"]
    lengths = np.array([len(each) for each in ids], dtype=np.int64)
    flat = np.fromiter((token for each in ids for token in each), dtype=np.int32, count=int(lengths.sum()))
    others = {name: np.array(rows[name]) for name in ("prompt_length", "label", "example_id")}
    return {"input_ids": flat, "lengths": lengths, **others}


def _rows_of(artifact: Artifact) -> Dataset:
    arrays = artifact.arrays
    ends = np.cumsum(arrays["lengths"])
    features = {
        "input_ids": List(Value("int32")),
        "label": Value("bool"),
        "prompt_length": Value("int64"),
        "example_id": Value("int64"),
    }
    ids = np.split(arrays["input_ids"], ends[:-1])
    columns = {"input_ids": ids, **{name: arrays[name] for name in features if name != "input_ids"}}
    return Dataset.from_dict(columns, features=Features(features))


# ---- reference log-probs ----


class SharingTrainer(BCOTrainer):
    """BCOTrainer that looks its reference log-probs up before it computes them, and keeps what it computed.

    Args:
        source: Where the policy, which is its own reference, comes from.
        cache: Where reference log-probs are kept.
        **arguments: See BCOTrainer.
    """

    def __init__(self, *, source: PolicySource, cache: ArtifactCache, **arguments: Any) -> None:
        self._source = source
        self._cache = cache
        self._identity: dict[str, Any] | None = None
        super().__init__(**arguments)

    def _with_ref_logps(self, dataset: Any, name: str) -> Any:
        if dataset is None or REF_LOGPS in dataset.column_names:
            return dataset
        key = self._reference_key(dataset, name)
        if not self.accelerator.is_main_process:
            (found,) = broadcast_object_list([None])
            computed = super()._with_ref_logps(dataset, name) if found is None else None
            return computed if computed is not None else dataset.add_column(REF_LOGPS, found)
        with self._cache.claim(key) as claim:
            known = None if claim.found is None else claim.found.arrays[REF_LOGPS].tolist()
            if self.accelerator.num_processes > 1:
                broadcast_object_list([known])
            if known is not None:
                return dataset.add_column(REF_LOGPS, known)
            rows = super()._with_ref_logps(dataset, name)
            claim.keep(Artifact({REF_LOGPS: np.array(rows[REF_LOGPS], dtype=np.float32)}))
            return rows

    def _reference_key(self, dataset: Dataset, name: str) -> ArtifactKey:
        self._identity = self._identity or policy_identity(self._source)
        return reference_key(self._identity, dataset, self.args, name, precision=self.accelerator.mixed_precision)


def reference_key(
    identity: dict[str, Any], rows: Dataset, args: BCOConfig, name: str, *, precision: str
) -> ArtifactKey:
    """What reference log-probs depend on.

    Args:
        identity: Of the policy (see `policy_identity`).
        rows: Tokenised.
        args: Batch sizes and device.
        name: "train" or the name of an evaluation set.
        precision: Of the accelerator: "no", "bf16" or "fp16".
    """
    columns = _columns_of(rows)
    parts = {
        **identity,
        "rows": digest_of(*(columns[each] for each in sorted(columns) if each != "label")),
        # Batches decide how sums are rounded, and an untrained policy must equal its reference to the last bit.
        "batch": 2 * args.train_batch_size if name == "train" else args.eval_batch_size,
        "precision": precision,
        "device": args.device.type,
        **_libraries(),
    }
    return ArtifactKey("reference-logps", REFERENCE_VERSION, parts)


def _libraries() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}
