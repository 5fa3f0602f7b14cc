"""A log's rows as columns, and what can be counted of them: rows, sources, times, lengths, cuts, repeats."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from bco_lab.data.rows import text_key
from bco_lab.data.tokenization import tokenize_dataset
from bco_lab.embedding import raw_prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

BINS = 40
EXAMPLES = 5
SOURCES = 20
CLASSES = ("desirable", "undesirable")
_LONGEST_TEXT = 200  # characters of an example


@dataclass(frozen=True)
class Cut:
    """What a limit on the tokens of a row does.

    Attributes:
        max_length: The limit; None for none.
        asked: Whether it is the one asked for.
        whole: Rows that keep all their tokens.
        truncated: Rows that lose some.
        dropped: Rows that are left out (truncation=drop).
        refused: Rows whose prompt leaves no room for a completion token; they stop the training.
        too_long: Rows over `max_length`, after `max_completion_length`.
        lost_tokens: Share of all tokens that training would not see.
        affected_desirable: Share of desirable rows that are not whole; None without any.
        affected_undesirable: Share of undesirable rows that are not whole; None without any.
    """

    max_length: int | None
    asked: bool
    whole: int
    truncated: int
    dropped: int
    refused: int
    too_long: int
    lost_tokens: float
    affected_desirable: float | None
    affected_undesirable: float | None


@dataclass(frozen=True, eq=False)
class Log:
    """Rows as columns; texts are numbered by first appearance, so that equal texts have equal numbers."""

    prompts: list[Any]
    completions: list[Any]
    labels: Bools
    example_ids: list[int]
    sources: list[str | None] | None
    prompt_numbers: Integers
    pair_numbers: Integers  # of prompt and completion together
    prompt_tokens: Integers
    completion_tokens: Integers

    @classmethod
    def read(cls, rows: Dataset, tokenizer: "PreTrainedTokenizerBase", encoder_decoder: bool, name: str) -> "Log":
        """Tokenise rows without any limit and lay them out in columns."""
        needed = ("prompt", "completion", "label", "example_id")
        only = rows.select_columns([column for column in needed if column in rows.column_names])
        tokenised, _report = tokenize_dataset(
            only, tokenizer, max_length=None, name=name, encoder_decoder=encoder_decoder
        )
        table = tokenised.with_format("arrow")[:]
        total = np.concatenate([chunk.value_lengths().to_numpy() for chunk in table["input_ids"].chunks])
        prompt_tokens = table["prompt_length"].to_numpy()
        prompts, completions = list(rows["prompt"]), list(rows["completion"])
        prompt_keys = [text_key(prompt) for prompt in prompts]
        pairs = zip(prompt_keys, map(text_key, completions), strict=True)
        return cls(
            prompts=prompts,
            completions=completions,
            labels=np.array(table["label"].to_pylist(), dtype=bool),
            example_ids=table["example_id"].to_pylist(),
            sources=list(rows["source"]) if "source" in rows.column_names else None,
            prompt_numbers=numbered(prompt_keys),
            pair_numbers=numbered(pairs),
            prompt_tokens=prompt_tokens,
            completion_tokens=total.astype(np.int64) - prompt_tokens,
        )

    @cached_property
    def tokens(self) -> Integers:
        """Tokens of each row, prompt and completion."""
        return self.prompt_tokens + self.completion_tokens

    def classes(self) -> Iterable[tuple[str, Bools]]:
        """Name of each class and which rows are in it."""
        return zip(CLASSES, (self.labels, ~self.labels), strict=True)


def numbered(values: Iterable[Any]) -> Integers:
    """Numbers from 0 on, in order of first appearance; equal values have equal ones."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


# ---- counts ----


def count_rows(log: Log, held_out: int | None) -> dict[str, Any]:
    """Rows, labels and prompts."""
    rows, desirable = len(log.labels), int(log.labels.sum())
    per_prompt = np.bincount(log.prompt_numbers)
    return {
        "rows": rows,
        "desirable": desirable,
        "undesirable": rows - desirable,
        "desirable_share": desirable / rows,
        "prompts": len(per_prompt),
        "rows_per_prompt": float(per_prompt.mean()),
        "most_rows_of_a_prompt": int(per_prompt.max()),
        "held_out": held_out,
    }


def count_sources(log: Log) -> list[dict[str, Any]]:
    """Rows and desirable share by source; beyond SOURCES of them, the others together."""
    if log.sources is None:
        return []
    rows, desirable = Counter(log.sources), Counter(np.array(log.sources, dtype=object)[log.labels].tolist())
    ranked = [source for source, _count in rows.most_common()]
    found: list[tuple[str, list[str | None]]] = [
        ("(not given)" if source is None else source, [source]) for source in ranked[:SOURCES]
    ]
    if len(ranked) > SOURCES:
        found.append((f"({len(ranked) - SOURCES} more)", ranked[SOURCES:]))
    table = []
    for source, members in found:
        count = sum(rows[member] for member in members)
        share = sum(desirable[member] for member in members) / count
        table.append({"source": source, "rows": count, "desirable_share": share})
    return table


def time_range(timestamps: Iterable[str | None]) -> dict[str, Any] | None:
    """First and last moment, and how many rows name one; None without any."""
    instants = [instant for instant in map(_instant, timestamps) if instant is not None]
    if not instants:
        return None
    return {"first": min(instants).isoformat(), "last": max(instants).isoformat(), "rows": len(instants)}


def _instant(text: str | None) -> datetime | None:
    """The moment a timestamp names, UTC where it names no zone; None where it is none."""
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


# ---- lengths ----


def length_histograms(log: Log) -> dict[str, Any]:
    """Histogram and summary of tokens by class, of prompts, completions and whole rows."""
    parts = {"prompt": log.prompt_tokens, "completion": log.completion_tokens, "row": log.tokens}
    described = {}
    for part, tokens in parts.items():
        edges, scale = _edges(tokens)
        last = np.append(edges[:-1], max(edges[-1], tokens.max() + 1))  # the last bin takes the tail
        by_class = {
            label: {"counts": np.histogram(tokens[inside], last)[0].tolist(), **_summary(tokens[inside])}
            for label, inside in log.classes()
        }
        described[part] = {"edges": edges.tolist(), "scale": scale, "largest": int(tokens.max()), **by_class}
    return described


def _edges(tokens: Integers) -> tuple[Integers, str]:
    """At most BINS bins of whole tokens: equally wide up to the 99.5th percentile, or, with a long tail, growing."""
    low, high = int(tokens.min()), int(np.ceil(np.quantile(tokens, 0.995))) + 1
    if high > 8 * max(1.0, float(np.median(tokens))):
        edges = np.geomspace(max(low, 1), int(tokens.max()) + 1, BINS + 1).round().astype(np.int64)
        return np.unique(np.append(low, edges)), "log"
    width = max(1, -(-(high - low) // BINS))
    return np.arange(low, high + width, width, dtype=np.int64), "linear"


def _summary(tokens: Integers) -> dict[str, float | None]:
    if not len(tokens):
        return dict.fromkeys(("mean", "median", "p95", "max"))
    median, p95 = np.quantile(tokens, (0.5, 0.95))
    return {"mean": float(tokens.mean()), "median": float(median), "p95": float(p95), "max": int(tokens.max())}


@dataclass(frozen=True)
class Limits:
    """The limits asked for, and how a row is cut to them."""

    max_length: int | None
    max_completion_length: int | None
    truncation: str


def cut_to(log: Log, limits: Limits, max_length: int | None) -> Cut:
    """What `tokenize_dataset` would do to each row, from its lengths alone."""
    within = log.tokens
    if limits.max_completion_length is not None:
        within = log.prompt_tokens + np.minimum(log.completion_tokens, limits.max_completion_length)
    too_long = within > max_length if max_length is not None else np.zeros(len(within), dtype=bool)
    nothing = np.zeros(len(within), dtype=bool)
    dropped = too_long if limits.truncation == "drop" else nothing
    keeps_start = limits.truncation == "keep_start" and max_length is not None
    refused = too_long & (log.prompt_tokens >= (max_length or 0)) if keeps_start else nothing
    gone = dropped | refused
    kept = np.where(gone, 0, within if max_length is None else np.minimum(within, max_length))
    affected = kept < log.tokens
    shares = [float(affected[inside].mean()) if inside.any() else None for _label, inside in log.classes()]
    return Cut(
        max_length=max_length,
        asked=max_length == limits.max_length,
        whole=int((~affected).sum()),
        truncated=int((affected & ~gone).sum()),
        dropped=int(dropped.sum()),
        refused=int(refused.sum()),
        too_long=int(too_long.sum()),
        lost_tokens=float(1 - kept.sum() / log.tokens.sum()),
        affected_desirable=shares[0],
        affected_undesirable=shares[1],
    )


# ---- repeats ----


def find_repeats(log: Log) -> dict[str, Any]:
    """Rows that say the same, or the opposite, of the same completion or prompt."""
    ups = np.bincount(log.pair_numbers[log.labels], minlength=int(log.pair_numbers.max()) + 1)
    downs = np.bincount(log.pair_numbers[~log.labels], minlength=len(ups))
    repeated = np.maximum(ups - 1, 0) + np.maximum(downs - 1, 0)
    both = (ups > 0) & (downs > 0)
    mixed = np.zeros(int(log.prompt_numbers.max()) + 1, dtype=bool)
    mixed[np.intersect1d(log.prompt_numbers[log.labels], log.prompt_numbers[~log.labels])] = True
    mixed_rows = int(mixed[log.prompt_numbers].sum())
    return {
        "duplicates": {
            "rows": int(repeated.sum()),
            "texts": int((repeated > 0).sum()),
            "examples": _pair_examples(log, repeated),
        },
        "contradictions": {
            "pairs": int(both.sum()),
            "rows": int((ups + downs)[both].sum()),
            "examples": _pair_examples(log, np.where(both, ups + downs, 0)),
        },
        "mixed_prompts": {
            "prompts": int(mixed.sum()),
            "rows": mixed_rows,
            "share": mixed_rows / len(log.labels),
        },
    }


def _pair_examples(log: Log, weight: Integers) -> list[dict[str, Any]]:
    """The heaviest pairs of prompt and completion, those without weight left out."""
    chosen = [int(pair) for pair in np.argsort(-weight, kind="stable")[:EXAMPLES] if weight[pair] > 0]
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(np.isin(log.pair_numbers, chosen)):
        rows_of[int(log.pair_numbers[row])].append(int(row))
    return [
        {
            "prompt": shown(raw_prompt_text(log.prompts[rows_of[pair][0]])),
            "completion": shown(_completion_text(log.completions[rows_of[pair][0]])),
            "desirable": int(log.labels[rows_of[pair]].sum()),
            "undesirable": int((~log.labels[rows_of[pair]]).sum()),
            "example_ids": [log.example_ids[row] for row in rows_of[pair][:EXAMPLES]],
        }
        for pair in chosen
    ]


def _completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(completion, str):
        return completion
    return "\n\n".join(message["content"] for message in completion)


def shown(text: str) -> str:
    """The text on one line, its end cut off where it is long."""
    line = " ".join(text[: 4 * _LONGEST_TEXT].split())
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 1].rstrip() + "…"
