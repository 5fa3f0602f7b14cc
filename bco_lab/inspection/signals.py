"""What the labels go by besides quality: the length of the answer, the kind of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bco_lab.density_ratio import density_ratio, summarize_weights
from bco_lab.embedding import raw_prompt_text
from bco_lab.inspection.rows import BINS, CLASSES, EXAMPLES, Log, numbered, shown
from bco_lab.prompt_classifier import UdmDiagnostics, clustered_auc
from bco_lab.udm import UdmReport

Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

BOUNDS = ((0.5, 2.0), (0.5, 5.0), (0.5, 10.0), (0.25, 10.0), (0.1, 20.0))

_ENOUGH_PROMPTS = 10  # with fewer in a class, the spread between prompts says little, and rows count one by one
_NORMAL_97_5 = 1.959963984540054


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


# ---- length and label ----


def length_signal_of(log: Log) -> LengthSignal:
    """How far the length of a completion tells its label."""
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
    if not follows_length(auc, low, high):
        return f"No: the length of an answer says next to nothing about its thumb ({figures})."
    kind = "longer" if auc > 0.5 else "shorter"
    if strength(auc) < 0.1:
        return f"A little: {kind} answers get somewhat more thumbs-up ({figures})."
    return f"Yes: thumbs-up go to {kind} answers ({figures})."


def follows_length(auc: float, low: float, high: float) -> bool:
    """With many rows an interval excludes 0.5 by a hair, which nobody needs to know."""
    return not low <= 0.5 <= high and strength(auc) >= 0.02


def strength(auc: float) -> float:
    """How far an AUC is from chance, in [0, 0.5]."""
    return abs(auc - 0.5)


# ---- prompts and matching ----


def what_matching_does(
    log: Log,
    p_desirable: Sequence[float] | None,
    diagnostics: UdmDiagnostics | None,
    bounds: tuple[float, float],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """What tells the classes' prompts apart, what matching would do, and whether it should."""
    if log.labels.all() or not log.labels.any():
        only = CLASSES[0] if log.labels.any() else CLASSES[1]
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


def _prompt_shift(log: Log, p: Floats, diagnostics: UdmDiagnostics) -> dict[str, Any]:
    edges = np.linspace(0.0, 1.0, 21)
    histogram = {label: np.histogram(p[inside], edges)[0].tolist() for label, inside in log.classes()}
    most, least = _telling_prompts(log, p) if diagnostics.auc is not None else ([], [])
    return {
        "classifier": diagnostics.to_dict(),
        "histogram": {"edges": edges.tolist(), **histogram},
        "most_desirable": most,
        "most_undesirable": least,
    }


def _telling_prompts(log: Log, p: Floats) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The prompts with the highest and the lowest probability, what users wrote being what counts."""
    numbers = numbered(raw_prompt_text(prompt) for prompt in log.prompts)
    _values, first = np.unique(numbers, return_index=True)
    ranked = np.argsort(-p[first], kind="stable")
    ups, downs = (np.bincount(numbers[inside], minlength=len(first)) for _label, inside in log.classes())

    def described(chosen: Integers) -> list[dict[str, Any]]:
        return [
            {
                "prompt": shown(raw_prompt_text(log.prompts[first[number]])),
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
