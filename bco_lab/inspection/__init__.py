"""What a log of thumbs holds, before anything is trained on it: the figures of `bco-lab inspect`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from bco_lab.files import json_ready
from bco_lab.inspection.findings import Finding, collect_findings
from bco_lab.inspection.rows import (
    Cut,
    Limits,
    Log,
    count_rows,
    count_sources,
    cut_to,
    find_repeats,
    length_histograms,
    time_range,
)
from bco_lab.inspection.signals import BOUNDS, LengthSignal, length_signal_of, what_matching_does
from bco_lab.prompt_classifier import UdmDiagnostics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BOUNDS", "LIMITS", "Cut", "Finding", "Inspection", "LengthSignal", "inspect_rows"]

LIMITS = (256, 512, 1024, 2048, 4096)


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
    log = Log.read(rows, tokenizer, encoder_decoder, name)
    limits = Limits(max_length, max_completion_length, truncation)
    settings = {
        "max_length": max_length,
        "max_completion_length": max_completion_length,
        "truncation": truncation,
        "min_density_ratio": min_density_ratio,
        "max_density_ratio": max_density_ratio,
    }
    cuts = [cut_to(log, limits, length) for length in sorted({*LIMITS, max_length or LIMITS[0]})]
    if max_length is None:
        cuts.append(cut_to(log, limits, None))
    signal = length_signal_of(log)
    shift, udm, recommendation = what_matching_does(
        log, p_desirable, diagnostics, (min_density_ratio, max_density_ratio)
    )
    counts, repeats, sources = count_rows(log, held_out), find_repeats(log), count_sources(log)
    findings = collect_findings(
        log, counts, sources, next(cut for cut in cuts if cut.asked), repeats, signal, udm, limits
    )
    return Inspection(
        name=name,
        settings=settings,
        loading=None if loading is None else dict(loading),
        counts=counts,
        sources=sources,
        times=time_range(rows["timestamp"]) if "timestamp" in rows.column_names else None,
        lengths=length_histograms(log),
        truncation=cuts,
        repeats=repeats,
        length_signal=signal,
        prompt_shift=shift,
        udm=udm,
        recommendation=recommendation,
        findings=findings,
    )
