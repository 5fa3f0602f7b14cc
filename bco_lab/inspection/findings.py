"""Figures to sentences: what a user should know before training, and what to do about it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bco_lab.inspection.rows import CLASSES, Cut, Limits, Log
from bco_lab.inspection.signals import LengthSignal, follows_length, strength


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


def collect_findings(
    log: Log,
    counts: Mapping[str, Any],
    sources: list[dict[str, Any]],
    cut: Cut,
    repeats: Mapping[str, Any],
    signal: LengthSignal,
    udm: Mapping[str, Any] | None,
    limits: Limits,
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


def _about_limits(log: Log, cut: Cut, limits: Limits) -> Iterable[Finding]:
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
    rarer = min(CLASSES, key=lambda label: counts[label])
    rows = counts[rarer]
    share = rows / counts["rows"]
    if not rows:
        other = next(label for label in CLASSES if label != rarer)
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


def _about_length(log: Log, signal: LengthSignal) -> Iterable[Finding]:
    if signal.auc is None or signal.auc_low is None or signal.auc_high is None:
        return
    if not follows_length(signal.auc, signal.auc_low, signal.auc_high):
        return
    more, write = ("longer", "more") if signal.auc > 0.5 else ("shorter", "less")
    means = [log.completion_tokens[inside].mean() for _label, inside in log.classes()]
    yield Finding(
        _level(strength(signal.auc), warning=0.1),
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
