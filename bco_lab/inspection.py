"""What a log of thumbs holds, before anything is trained on it: the figures of `bco-lab inspect`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from bco_lab.data.rows import text_key
from bco_lab.data.tokenization import tokenize_dataset
from bco_lab.density_ratio import density_ratio, summarize_weights
from bco_lab.embedding import raw_prompt_text
from bco_lab.files import json_ready
from bco_lab.prompt_classifier import UdmDiagnostics, clustered_auc
from bco_lab.udm import UdmReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

LIMITS = (256, 512, 1024, 2048, 4096)
BOUNDS = ((0.5, 2.0), (0.5, 5.0), (0.5, 10.0), (0.25, 10.0), (0.1, 20.0))
BINS = 40
EXAMPLES = 5
SOURCES = 20

_LONGEST_TEXT = 200  # characters of an example
_ENOUGH_PROMPTS = 10  # with fewer in a class, the spread between prompts says little, and rows count one by one
_NORMAL_97_5 = 1.959963984540054
_CLASSES = ("desirable", "undesirable")


@dataclass(frozen=True)
class Finding:
    """Something to know before training.

    Attributes:
        level: "stop": training would fail or learn nothing; "warning": it would learn something else than meant;
            "note": good to know.
        finding: A sentence with a figure.
        action: What to do about it.
    """

    level: str
    finding: str
    action: str


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


@dataclass(frozen=True)
class LengthSignal:
    """What the length of a completion says of its thumb.

    Attributes:
        auc: How often a desirable completion is longer than an undesirable one, ties half; None with one class.
        auc_low: Lower end of its 95% interval; None with fewer than two rows of a class.
        auc_high: Upper end.
        spearman: Rank correlation of length and label; None with one class or equal lengths.
        clusters: What the interval takes as one observation: "prompts" or "rows".
        verdict: A sentence.
    """

    auc: float | None
    auc_low: float | None
    auc_high: float | None
    spearman: float | None
    clusters: str
    verdict: str


@dataclass(frozen=True)
class Inspection:
    """What a set of feedback holds and what training would make of it.

    Attributes:
        name: Of the source.
        settings: Limits and bounds that were asked for.
        loading: What became of the source's records; None where nobody counted them.
        counts: Rows, labels, different prompts, rows per prompt, rows that are held out.
        sources: Rows and desirable share by source, most rows first; empty without a source column.
        times: First and last timestamp and how many rows have one; None without any.
        lengths: Tokens of `prompt`, `completion` and `row`: histogram and summary by class.
        truncation: What each limit does, ascending.
        repeats: Duplicates, contradictions, and prompts seen with both labels.
        length_signal: Whether thumbs follow length.
        prompt_shift: What tells the prompts of both classes apart; None where no classifier looked.
        udm: What matching would do to the undesirable rows; None where no classifier looked.
        recommendation: Whether matching is indicated, and why.
        findings: By weight.
    """

    name: str
    settings: dict[str, Any]
    loading: dict[str, Any] | None
    counts: dict[str, Any]
    sources: list[dict[str, Any]]
    times: dict[str, Any] | None
    lengths: dict[str, Any]
    truncation: list[Cut]
    repeats: dict[str, Any]
    length_signal: LengthSignal
    prompt_shift: dict[str, Any] | None
    udm: dict[str, Any] | None
    recommendation: str
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        content: dict[str, Any] = json_ready(asdict(self))
        return content


def inspect_rows(
    rows: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_completion_length: int | None,
    truncation: str,
    p_desirable: Sequence[float] | None,
    diagnostics: UdmDiagnostics | None,
    min_density_ratio: float,
    max_density_ratio: float,
    encoder_decoder: bool = False,
    name: str,
    loading: Mapping[str, Any] | None = None,
    held_out: int | None = None,
) -> Inspection:
    """Look at all rows of a source: who gave thumbs to what, what would be cut, what the labels go by.

    Args:
        rows: The whole set before it is split: `prompt`, `completion`, `label`, `example_id`, and where the log has
            them `source` and `timestamp` (ISO 8601).
        tokenizer: The policy's.
        max_length: See `tokenize_dataset`.
        max_completion_length: See `tokenize_dataset`.
        truncation: See `tokenize_dataset`.
        p_desirable: Held-out `p(desirable | prompt)` of each row; None where none was computed.
        diagnostics: Of the classifier behind it; None with it.
        min_density_ratio: Lower clamp of the weights.
        max_density_ratio: Upper clamp of the weights.
        encoder_decoder: Whether the model is an encoder-decoder.
        name: Of the source.
        loading: What became of its records.
        held_out: Rows that would not be trained on.

    Raises:
        ValueError: A row that cannot be tokenised, or one probability without the other; the message says which.
    """
    if (p_desirable is None) != (diagnostics is None) or (p_desirable is not None and len(p_desirable) != len(rows)):
        found = "none" if p_desirable is None else len(p_desirable)
        raise ValueError(f"{name}: {found} probabilities for {len(rows)} rows; all are needed, with their diagnostics")
    log = _Log.read(rows, tokenizer, encoder_decoder, name)
    limits = _Limits(max_length, max_completion_length, truncation)
    settings = {
        "max_length": max_length,
        "max_completion_length": max_completion_length,
        "truncation": truncation,
        "min_density_ratio": min_density_ratio,
        "max_density_ratio": max_density_ratio,
    }
    cuts = [_cut(log, limits, length) for length in sorted({*LIMITS, max_length or LIMITS[0]})]
    if max_length is None:
        cuts.append(_cut(log, limits, None))
    signal = _length_signal(log)
    shift, udm, recommendation = _matching(log, p_desirable, diagnostics, (min_density_ratio, max_density_ratio))
    counts, repeats, sources = _counts(log, held_out), _repeats(log), _sources(log)
    findings = _findings(log, counts, sources, next(cut for cut in cuts if cut.asked), repeats, signal, udm, limits)
    return Inspection(
        name=name,
        settings=settings,
        loading=None if loading is None else dict(loading),
        counts=counts,
        sources=sources,
        times=_times(rows["timestamp"]) if "timestamp" in rows.column_names else None,
        lengths=_lengths(log),
        truncation=cuts,
        repeats=repeats,
        length_signal=signal,
        prompt_shift=shift,
        udm=udm,
        recommendation=recommendation,
        findings=findings,
    )


# ---- the rows, read once ----


@dataclass(frozen=True, eq=False)
class _Log:
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
    def read(cls, rows: Dataset, tokenizer: "PreTrainedTokenizerBase", encoder_decoder: bool, name: str) -> "_Log":
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
            prompt_numbers=_numbered(prompt_keys),
            pair_numbers=_numbered(pairs),
            prompt_tokens=prompt_tokens,
            completion_tokens=total.astype(np.int64) - prompt_tokens,
        )

    @cached_property
    def tokens(self) -> Integers:
        return self.prompt_tokens + self.completion_tokens

    def classes(self) -> Iterable[tuple[str, Bools]]:
        """Name of each class and which rows are in it."""
        return zip(_CLASSES, (self.labels, ~self.labels), strict=True)


def _numbered(values: Iterable[Any]) -> Integers:
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


# ---- counts ----


def _counts(log: _Log, held_out: int | None) -> dict[str, Any]:
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


def _sources(log: _Log) -> list[dict[str, Any]]:
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


def _times(timestamps: Iterable[str | None]) -> dict[str, Any] | None:
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


def _lengths(log: _Log) -> dict[str, Any]:
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
class _Limits:
    """The limits asked for, and how a row is cut to them."""

    max_length: int | None
    max_completion_length: int | None
    truncation: str


def _cut(log: _Log, limits: _Limits, max_length: int | None) -> Cut:
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


def _repeats(log: _Log) -> dict[str, Any]:
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


def _pair_examples(log: _Log, weight: Integers) -> list[dict[str, Any]]:
    """The heaviest pairs of prompt and completion, those without weight left out."""
    chosen = [int(pair) for pair in np.argsort(-weight, kind="stable")[:EXAMPLES] if weight[pair] > 0]
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(np.isin(log.pair_numbers, chosen)):
        rows_of[int(log.pair_numbers[row])].append(int(row))
    return [
        {
            "prompt": _shown(raw_prompt_text(log.prompts[rows_of[pair][0]])),
            "completion": _shown(_completion_text(log.completions[rows_of[pair][0]])),
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


def _shown(text: str) -> str:
    """The text on one line, its end cut off where it is long."""
    line = " ".join(text[: 4 * _LONGEST_TEXT].split())
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 1].rstrip() + "…"


# ---- length and label ----


def _length_signal(log: _Log) -> LengthSignal:
    lengths, labels = log.completion_tokens.astype(np.float64), log.labels
    prompts_of = [len(np.unique(log.prompt_numbers[inside])) for _label, inside in log.classes()]
    by_prompt = min(prompts_of) >= _ENOUGH_PROMPTS
    rows_of_rarer = min(int(labels.sum()), int((~labels).sum()))
    auc = low = high = None
    if rows_of_rarer >= 2:
        clusters = log.prompt_numbers if by_prompt else np.arange(len(labels))
        auc, standard_error = clustered_auc(lengths, labels, clusters)
        half = _NORMAL_97_5 * standard_error
        low, high = max(0.0, auc - half), min(1.0, auc + half)
    elif rows_of_rarer:
        up, down = lengths[labels], lengths[~labels]
        auc = float(((up[:, None] > down).mean() + (up[:, None] >= down).mean()) / 2)
    return LengthSignal(
        auc, low, high, _spearman(lengths, labels), "prompts" if by_prompt else "rows", _length_verdict(auc, low, high)
    )


def _spearman(lengths: Floats, labels: Bools) -> float | None:
    values, place, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    if len(values) < 2 or labels.all() or not labels.any():
        return None
    middle = np.cumsum(counts) - (counts - 1) / 2  # equal lengths share the mean of their ranks
    return float(np.corrcoef(middle[place], labels)[0, 1])


def _length_verdict(auc: float | None, low: float | None, high: float | None) -> str:
    if auc is None or low is None or high is None:
        return "Too few rows of one class to tell whether thumbs follow length."
    figures = f"AUC {auc:.2f}, 95% interval {low:.2f} to {high:.2f}"
    if not _follows_length(auc, low, high):
        return f"No: the length of an answer says next to nothing about its thumb ({figures})."
    kind = "longer" if auc > 0.5 else "shorter"
    if _strength(auc) < 0.1:
        return f"A little: {kind} answers get somewhat more thumbs-up ({figures})."
    return f"Yes: thumbs-up go to {kind} answers ({figures})."


def _follows_length(auc: float, low: float, high: float) -> bool:
    """With many rows an interval excludes 0.5 by a hair, which nobody needs to know."""
    return not low <= 0.5 <= high and _strength(auc) >= 0.02


def _strength(auc: float) -> float:
    return abs(auc - 0.5)


# ---- prompts and matching ----


def _matching(
    log: _Log,
    p_desirable: Sequence[float] | None,
    diagnostics: UdmDiagnostics | None,
    bounds: tuple[float, float],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """What tells the classes' prompts apart, what matching would do, and whether it should."""
    if log.labels.all() or not log.labels.any():
        only = _CLASSES[0] if log.labels.any() else _CLASSES[1]
        return None, None, f"UDM is not indicated because all rows are {only}: there is no second class to match."
    if p_desirable is None or diagnostics is None:
        return None, None, "Whether UDM is indicated was not examined: no classifier has looked at the prompts."
    p = np.asarray(p_desirable, dtype=np.float64)
    undesirable = torch.from_numpy(p[~log.labels])
    report = UdmReport(diagnostics, summarize_weights(undesirable, *bounds))
    alternatives = [
        {"min": low, "max": high, "asked": (low, high) == bounds, **summarize_weights(undesirable, low, high).to_dict()}
        for low, high in ([] if bounds in BOUNDS else [bounds]) + list(BOUNDS)
    ]
    udm = {
        "weights": report.weights.to_dict(),
        "histogram": _ratio_histogram(undesirable, bounds),
        "alternatives": alternatives,
    }
    return _prompt_shift(log, p, diagnostics), udm, report.recommendation


def _prompt_shift(log: _Log, p: Floats, diagnostics: UdmDiagnostics) -> dict[str, Any]:
    edges = np.linspace(0.0, 1.0, 21)
    histogram = {label: np.histogram(p[inside], edges)[0].tolist() for label, inside in log.classes()}
    most, least = _telling_prompts(log, p) if diagnostics.auc is not None else ([], [])
    return {
        "classifier": diagnostics.to_dict(),
        "histogram": {"edges": edges.tolist(), **histogram},
        "most_desirable": most,
        "most_undesirable": least,
    }


def _telling_prompts(log: _Log, p: Floats) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The prompts with the highest and the lowest probability, what users wrote being what counts."""
    numbers = _numbered(raw_prompt_text(prompt) for prompt in log.prompts)
    _values, first = np.unique(numbers, return_index=True)
    ranked = np.argsort(-p[first], kind="stable")
    ups, downs = (np.bincount(numbers[inside], minlength=len(first)) for _label, inside in log.classes())

    def described(chosen: Integers) -> list[dict[str, Any]]:
        return [
            {
                "prompt": _shown(raw_prompt_text(log.prompts[first[number]])),
                "p": float(p[first[number]]),
                "desirable": int(ups[number]),
                "undesirable": int(downs[number]),
            }
            for number in chosen
        ]

    half = min(EXAMPLES, (len(ranked) + 1) // 2)
    return described(ranked[:half]), described(ranked[::-1][: min(half, len(ranked) - half)])


def _ratio_histogram(undesirable: torch.Tensor, bounds: tuple[float, float]) -> dict[str, Any]:
    """Density ratios before clamping, in bins that grow by a constant factor; the outer bins take the tails."""
    low, high = min(0.01, bounds[0]), max(100.0, bounds[1])
    edges = np.geomspace(low, high, BINS + 1)
    edges[0], edges[-1] = low, high
    counts, _edges = np.histogram(density_ratio(undesirable, low, high).numpy(), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


# ---- findings ----


def _findings(
    log: _Log,
    counts: Mapping[str, Any],
    sources: list[dict[str, Any]],
    cut: Cut,
    repeats: Mapping[str, Any],
    signal: LengthSignal,
    udm: Mapping[str, Any] | None,
    limits: _Limits,
) -> list[Finding]:
    """All that a user should know, what stops training first."""
    found = [
        *_about_limits(log, cut, limits),
        *_about_classes(counts),
        *_about_length(log, signal),
        *_about_repeats(counts, repeats),
        *_about_sources(sources, counts["rows"]),
        *_about_prompts(counts, repeats),
        *_about_weights(udm),
    ]
    levels = ("stop", "warning", "note")
    return sorted(found, key=lambda finding: levels.index(finding.level))


def _about_limits(log: _Log, cut: Cut, limits: _Limits) -> Iterable[Finding]:
    rows = len(log.labels)
    # the next power of two that is more than now and holds 99 of 100 rows
    room = 1 << int(np.ceil(np.log2(max(np.quantile(log.tokens, 0.99), (cut.max_length or 0) + 1))))
    raise_it = f"Set trainer.max_length={room}, which keeps {_percent((log.tokens <= room).mean())} of the rows whole"
    if cut.refused:
        yield Finding(
            "stop",
            f"{_rows(cut.refused)} ({_percent(cut.refused / rows)}) have a prompt that alone reaches "
            f"max_length={cut.max_length}, and truncation=keep_start refuses such a row.",
            f"Set trainer.truncation=keep_end or drop, or trainer.max_length above {log.prompt_tokens.max():,}, the "
            "tokens of the longest prompt.",
        )
    if cut.dropped:
        yield Finding(
            _level(cut.dropped / rows, warning=0.05),
            f"{_rows(cut.dropped)} ({_percent(cut.dropped / rows)}) are longer than max_length={cut.max_length} and "
            f"would be left out, with {_percent(cut.lost_tokens)} of all tokens.",
            f"{raise_it}, or trainer.truncation=keep_start.",
        )
    by_length = cut.too_long - cut.refused - cut.dropped
    if by_length:
        end = "the start of the prompt" if limits.truncation == "keep_end" else "the end of the completion"
        yield Finding(
            _level(by_length / rows, warning=0.05),
            f"max_length={cut.max_length} cuts {end} of {_rows(by_length)} ({_percent(by_length / rows)}).",
            f"{raise_it}.",
        )
    by_cap = cut.truncated - by_length
    if by_cap:
        yield Finding(
            _level(by_cap / rows, warning=0.05),
            f"max_completion_length={limits.max_completion_length} cuts the end of the completion of {_rows(by_cap)} "
            f"({_percent(by_cap / rows)}) that max_length would leave whole.",
            "Raise trainer.max_completion_length.",
        )


def _about_classes(counts: Mapping[str, Any]) -> Iterable[Finding]:
    rarer = min(_CLASSES, key=lambda label: counts[label])
    rows = counts[rarer]
    share = rows / counts["rows"]
    if not rows:
        other = next(label for label in _CLASSES if label != rarer)
        yield Finding("stop", f"All {counts['rows']:,} rows are {other}.", f"BCO needs both classes: add {rarer} rows.")
        return
    if rows < 200:
        yield Finding(
            "warning",
            f"Only {_rows(rows)} {'is' if rows == 1 else 'are'} {rarer}: figures on a held-out part of them will "
            "be rough.",
            "Collect more feedback, and compare runs over several seeds.",
        )
    if share < 0.35:
        yield Finding(
            _level(1 - share, warning=0.8),
            f"Only {_percent(share)} of the rows are {rarer}, so many steps see few of them or none.",
            "Set dataset.balance=oversample, and keep trainer.loss_reduction=class_balanced.",
        )


def _about_length(log: _Log, signal: LengthSignal) -> Iterable[Finding]:
    if signal.auc is None or signal.auc_low is None or signal.auc_high is None:
        return
    if not _follows_length(signal.auc, signal.auc_low, signal.auc_high):
        return
    more, write = ("longer", "more") if signal.auc > 0.5 else ("shorter", "less")
    means = [log.completion_tokens[inside].mean() for _label, inside in log.classes()]
    yield Finding(
        _level(_strength(signal.auc), warning=0.1),
        f"Length alone predicts the label with AUC {signal.auc:.2f}: desirable completions have {means[0]:.0f} tokens "
        f"on average, undesirable ones {means[1]:.0f}.",
        f"Expect the policy to write {write}; if {more} is not better, thin out the longest and shortest rows, and "
        "compare the lengths of samples before and after.",
    )


def _about_repeats(counts: Mapping[str, Any], repeats: Mapping[str, Any]) -> Iterable[Finding]:
    contradictions, duplicates = repeats["contradictions"], repeats["duplicates"]
    if contradictions["pairs"]:
        share = contradictions["rows"] / counts["rows"]
        yield Finding(
            _level(share, warning=0.01),
            f"{_rows(contradictions['rows'])} ({_percent(share)}) contradict each other: the same prompt and "
            "completion with both labels.",
            "Nothing can be learnt from them: keep the majority's label, or remove them.",
        )
    if duplicates["rows"]:
        share = duplicates["rows"] / counts["rows"]
        yield Finding(
            _level(share, warning=0.05),
            f"{_rows(duplicates['rows'])} ({_percent(share)}) repeat an earlier row, label included.",
            "They count more than once: remove them, unless each is a thumb of its own.",
        )


def _about_sources(sources: list[dict[str, Any]], rows: int) -> Iterable[Finding]:
    large = sorted(
        (source for source in sources if source["rows"] >= max(20, rows / 100)), key=lambda s: s["desirable_share"]
    )
    if len(large) < 2 or large[-1]["desirable_share"] - large[0]["desirable_share"] < 0.3:
        return
    least, most = large[0], large[-1]
    yield Finding(
        "warning",
        f"Thumbs differ by source: {most['source']!r} has {_percent(most['desirable_share'])} desirable rows, "
        f"{least['source']!r} {_percent(least['desirable_share'])}.",
        f"The policy will learn to write like {most['source']!r}; if that is not the point, train on one source.",
    )


def _about_prompts(counts: Mapping[str, Any], repeats: Mapping[str, Any]) -> Iterable[Finding]:
    if counts["prompts"] == 1:
        yield Finding(
            "note",
            f"All {counts['rows']:,} rows answer one prompt.",
            "The policy learns for this prompt; what it does with others has to be tried.",
        )
    elif counts["desirable"] and counts["undesirable"] and not repeats["mixed_prompts"]["prompts"]:
        yield Finding(
            "note",
            f"None of the {counts['prompts']:,} prompts has both labels.",
            "A good answer cannot be told from an easy prompt within any prompt; see what UDM says.",
        )


def _about_weights(udm: Mapping[str, Any] | None) -> Iterable[Finding]:
    if udm is None:
        return
    weights = udm["weights"]
    worth = weights["effective_sample_size"] / weights["rows"]
    if worth < 0.5:
        yield Finding(
            "note",
            f"With UDM the {weights['rows']:,} undesirable rows are worth {_percent(worth)} of their number.",
            "If you match, lower udm.max_density_ratio; the table of bounds says what that brings.",
        )


def _level(share: float, *, warning: float) -> str:
    return "warning" if share >= warning else "note"


def _rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")


def _percent(share: float) -> str:
    """Whole percents, with a decimal where that says more."""
    if 0 < share < 0.001:
        return "under 0.1%"
    if 0.999 < share < 1:
        return "over 99.9%"
    return f"{share:.1%}" if share < 0.1 or 0.99 < share < 1 else f"{share:.0%}"
