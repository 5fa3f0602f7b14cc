"""What an inspection counts, by hand on a few rows, against tokenisation itself, and where nothing may change."""

import json
import math
import random
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset

from bco_lab.data.tokenization import tokenize_dataset
from bco_lab.density_ratio import summarize_weights
from bco_lab.inspection import BOUNDS, LIMITS, Cut, Finding, Inspection, inspect_rows
from bco_lab.prompt_classifier import UdmDiagnostics
from bco_lab.udm import UdmReport, match_prompts

# Prompt, completion, label; one token a word, and <eos> ends each completion.
ROWS = [
    ("w2 w3 ", "w4", True),  # 2 + 2 tokens
    ("w2 w3 ", "w4", True),  # says the same again
    ("w2 w3 ", "w4", False),  # says the opposite
    ("w5 ", "w6 w7 w8", True),  # 1 + 4
    ("w5 ", "w9", False),  # 1 + 2
    ("w10 w11 w12 w13 ", "w14", False),  # 4 + 2
]
P = [0.875, 0.875, 0.875, 0.5, 0.5, 0.125]  # odds 7, 1 and 1/7


def _set(rows: list[tuple[Any, Any, bool]], **columns: list[Any]) -> Dataset:
    prompts, completions, labels = zip(*rows, strict=True)
    ids = [10 + number for number in range(len(rows))]
    named = {"prompt": prompts, "completion": completions, "label": labels, "example_id": ids}
    return Dataset.from_dict({key: list(values) for key, values in (named | columns).items()})


def _diagnostics(**fields: Any) -> UdmDiagnostics:
    known = {"rows": 6, "prompts": 3, "desirable": 3, "undesirable": 3, "dim": 4, "folds": 3}
    return UdmDiagnostics(**(known | {"auc": 0.8, "auc_low": 0.7, "auc_high": 0.9} | fields))


def _inspect(dataset: Dataset, **options: Any) -> Inspection:
    defaults: dict[str, Any] = {
        "max_length": 4,
        "max_completion_length": None,
        "truncation": "keep_start",
        "p_desirable": None,
        "diagnostics": None,
        "min_density_ratio": 0.5,
        "max_density_ratio": 5.0,
        "name": "thumbs",
    }
    return inspect_rows(dataset, tiny.tokenizer(), **(defaults | options))


def _asked(inspection: Inspection) -> Cut:
    (asked,) = [cut for cut in inspection.truncation if cut.asked]
    return asked


def _find(inspection: Inspection, words: str) -> Finding:
    (found,) = [finding for finding in inspection.findings if words in finding.finding]
    return found


def test_rows_and_prompts_are_counted() -> None:
    assert _inspect(_set(ROWS), held_out=2).counts == {
        "rows": 6,
        "desirable": 3,
        "undesirable": 3,
        "desirable_share": 0.5,
        "prompts": 3,
        "rows_per_prompt": 2.0,
        "most_rows_of_a_prompt": 3,
        "held_out": 2,
    }


def test_repeats_contradictions_and_prompts_with_both_labels() -> None:
    repeats = _inspect(_set(ROWS)).repeats
    texts = {"prompt": "w2 w3", "completion": "w4", "desirable": 2, "undesirable": 1, "example_ids": [10, 11, 12]}
    assert repeats["duplicates"] == {"rows": 1, "texts": 1, "examples": [texts]}
    assert repeats["contradictions"] == {"pairs": 1, "rows": 3, "examples": [texts]}
    assert repeats["mixed_prompts"] == {"prompts": 2, "rows": 5, "share": 5 / 6}


def test_only_five_examples_are_shown_and_long_texts_are_cut() -> None:
    pairs = [(f"w{2 + number} ", "w4 " * 300, True) for number in range(7)]
    found = _inspect(_set(pairs * 2 + [("w2 ", "w4", False)]), max_length=None).repeats["duplicates"]
    assert (found["rows"], len(found["examples"])) == (7, 5)
    assert {example["completion"] for example in found["examples"]} == {"w4 " * 66 + "w…"}  # 200 characters


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # tokens by row: 4, 4, 4, 5, 3, 6, in all 26; the last row's prompt alone has 4
        ({"truncation": "keep_start"}, Cut(4, True, 4, 1, 0, 1, 2, 1 - 19 / 26, 1 / 3, 1 / 3)),
        ({"truncation": "keep_end"}, Cut(4, True, 4, 2, 0, 0, 2, 1 - 23 / 26, 1 / 3, 1 / 3)),
        ({"truncation": "drop"}, Cut(4, True, 4, 0, 2, 0, 2, 1 - 15 / 26, 1 / 3, 1 / 3)),
        ({"max_length": 5}, Cut(5, True, 5, 1, 0, 0, 1, 1 - 25 / 26, 0.0, 1 / 3)),
        ({"max_length": None}, Cut(None, True, 6, 0, 0, 0, 0, 0.0, 0.0, 0.0)),
        ({"max_length": None, "max_completion_length": 1}, Cut(None, True, 0, 6, 0, 0, 0, 1 - 18 / 26, 1.0, 1.0)),
        ({"max_completion_length": 2}, Cut(4, True, 4, 1, 0, 1, 1, 1 - 18 / 26, 1 / 3, 1 / 3)),
    ],
)
def test_what_a_limit_cuts(options: dict[str, Any], expected: Cut) -> None:
    assert _asked(_inspect(_set(ROWS), **options)) == expected


def test_the_table_of_limits_holds_the_one_asked_for_once() -> None:
    assert [cut.max_length for cut in _inspect(_set(ROWS), max_length=4).truncation] == [4, *LIMITS]
    assert [cut.max_length for cut in _inspect(_set(ROWS), max_length=512).truncation] == list(LIMITS)
    assert [cut.max_length for cut in _inspect(_set(ROWS), max_length=None).truncation] == [*LIMITS, None]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop"])
@pytest.mark.parametrize("max_completion_length", [None, 5])
def test_cuts_are_those_of_tokenisation(truncation: str, max_completion_length: int | None) -> None:
    draw = random.Random(0)
    rows = [("w3 " * draw.randint(1, 8), "w4 " * draw.randint(1, 12), draw.random() < 0.5) for _ in range(120)]
    limits: dict[str, Any] = {
        "max_length": 9,
        "truncation": truncation,
        "max_completion_length": max_completion_length,
    }
    inspection = _inspect(_set(rows), **limits)
    cut = _asked(inspection)
    _tokenised, report = tokenize_dataset(_set(rows), tiny.tokenizer(), **limits)
    assert report is not None
    assert (cut.truncated, cut.dropped, cut.refused) == (report.truncated, report.dropped, 0)
    _whole, uncut = tokenize_dataset(_set(rows), tiny.tokenizer(), max_length=None)
    assert uncut is not None
    kept = report.mean_tokens * report.kept / (uncut.mean_tokens * uncut.kept)
    assert cut.lost_tokens == pytest.approx(1 - kept)


def test_an_encoder_decoder_is_tokenised_apart() -> None:
    arguments = dict.fromkeys(("p_desirable", "diagnostics", "max_completion_length"))
    inspection = inspect_rows(
        _set(ROWS),
        tiny.t5_tokenizer(),
        max_length=4,
        truncation="keep_end",
        min_density_ratio=0.5,
        max_density_ratio=5.0,
        encoder_decoder=True,
        name="thumbs",
        **arguments,
    )
    assert inspection.lengths["prompt"]["desirable"]["max"] == 3  # "w2 w3 <eos>"
    assert inspection.lengths["completion"]["undesirable"]["max"] == 2  # "w4 <eos>"


def test_lengths_by_class() -> None:
    lengths = _inspect(_set(ROWS)).lengths
    assert lengths["completion"]["desirable"] == {
        "counts": [2, 0, 1],
        "mean": pytest.approx(8 / 3),
        "median": 2.0,
        "p95": pytest.approx(3.8),
        "max": 4,
    }
    assert (lengths["completion"]["edges"], lengths["completion"]["scale"]) == ([2, 3, 4, 5], "linear")
    assert lengths["completion"]["undesirable"]["counts"] == [3, 0, 0]
    assert lengths["prompt"]["desirable"]["counts"] == [1, 2, 0, 0]
    assert lengths["row"]["largest"] == 6


def test_the_last_bin_takes_what_is_far_out() -> None:
    rows = [("w2 ", "w3 " * (1 + number % 6), number % 2 == 0) for number in range(600)] + [("w2 ", "w3 " * 200, True)]
    found = _inspect(_set(rows)).lengths["completion"]
    assert (found["scale"], found["edges"], found["largest"]) == ("linear", [2, 3, 4, 5, 6, 7, 8], 201)
    assert found["desirable"]["counts"] == [100, 0, 100, 0, 100, 1]


def test_bins_grow_where_the_tail_is_long() -> None:
    rows = [("w2 ", "w3 " * (2 if number % 10 else 300), number % 2 == 0) for number in range(200)]
    found = _inspect(_set(rows)).lengths["completion"]
    assert (found["scale"], found["edges"][0], found["edges"][-1]) == ("log", 3, 302)
    ratios = [high / low for low, high in pairwise(found["edges"])]
    assert ratios[-1] == pytest.approx((302 / 3) ** (1 / 40), abs=0.02)
    assert (sum(found["desirable"]["counts"]), found["desirable"]["counts"][-1]) == (100, 20)


def test_length_and_label_by_hand() -> None:
    signal = _inspect(_set(ROWS)).length_signal
    # desirable 2, 2, 4 against undesirable 2, 2, 2: six ties and three wins
    assert signal.auc == pytest.approx(6 / 9)
    assert signal.spearman == pytest.approx(1 / math.sqrt(5))
    assert signal.clusters == "rows"  # too few prompts to tell how much prompts differ
    assert signal.auc_low is not None
    assert signal.auc_low < 0.5
    assert signal.verdict.startswith("No: ")


def test_copies_of_rows_do_not_make_the_interval_narrower() -> None:
    draw = random.Random(1)
    rows = [(f"w{2 + number % 24} ", "w3 " * draw.randint(1, 9), number % 2 == 0) for number in range(48)]
    once, often = (_inspect(_set(rows * times)).length_signal for times in (1, 5))
    assert once.clusters == often.clusters == "prompts"
    assert (often.auc, often.auc_low, often.auc_high) == pytest.approx((once.auc, once.auc_low, once.auc_high))


@pytest.mark.parametrize(
    ("up", "down", "verdict", "advice"),
    [
        ((4, 9), (1, 6), "Yes: thumbs-up go to longer", "write more"),
        ((1, 6), (4, 9), "Yes: thumbs-up go to shorter", "less"),
    ],
)
def test_the_verdict_says_which_way(up: tuple[int, int], down: tuple[int, int], verdict: str, advice: str) -> None:
    draw = random.Random(2)
    rows = [("w2 ", "w3 " * draw.randint(*(up if number % 2 else down)), bool(number % 2)) for number in range(200)]
    inspection = _inspect(_set(rows), max_length=64)
    assert inspection.length_signal.verdict.startswith(verdict)
    assert advice in _find(inspection, "Length alone predicts the label").action
    assert _find(inspection, "Length alone").level == "warning"


def test_what_matching_would_do_by_hand() -> None:
    inspection = _inspect(_set(ROWS), p_desirable=P, diagnostics=_diagnostics())
    assert inspection.udm is not None
    weights = inspection.udm["weights"]  # 7, 1 and 1/7, clamped to 5, 1 and 1/2
    assert (weights["rows"], weights["share_below_min"], weights["share_above_max"]) == (
        3,
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
    )
    assert weights["mean"] == pytest.approx(6.5 / 3)
    assert weights["effective_sample_size"] == pytest.approx(6.5**2 / 26.25)
    edges, counts = inspection.udm["histogram"]["edges"], inspection.udm["histogram"]["counts"]
    filled = [(edges[i], edges[i + 1]) for i, count in enumerate(counts) if count]
    assert sum(counts) == 3
    assert all(low <= ratio <= high for ratio, (low, high) in zip((1 / 7, 1, 7), filled, strict=True))


def test_other_bounds_stand_beside_those_asked_for() -> None:
    known = _inspect(_set(ROWS), p_desirable=P, diagnostics=_diagnostics()).udm
    other = _inspect(
        _set(ROWS), p_desirable=P, diagnostics=_diagnostics(), min_density_ratio=0.25, max_density_ratio=2.0
    ).udm
    assert known is not None
    assert other is not None
    assert [(row["min"], row["max"]) for row in known["alternatives"]] == list(BOUNDS)
    assert [row["asked"] for row in known["alternatives"]] == [False, True, False, False, False]
    assert [(row["min"], row["max"]) for row in other["alternatives"]] == [(0.25, 2.0), *BOUNDS]
    assert other["alternatives"][0]["mean"] == pytest.approx((2 + 1 + 0.25) / 3)


def test_the_prompts_that_give_it_away() -> None:
    shift = _inspect(_set(ROWS), p_desirable=P, diagnostics=_diagnostics()).prompt_shift
    assert shift is not None
    assert shift["most_desirable"] == [
        {"prompt": "w2 w3", "p": 0.875, "desirable": 2, "undesirable": 1},
        {"prompt": "w5", "p": 0.5, "desirable": 1, "undesirable": 1},
    ]
    assert shift["most_undesirable"] == [{"prompt": "w10 w11 w12 w13", "p": 0.125, "desirable": 0, "undesirable": 1}]
    histogram = shift["histogram"]
    assert {i: count for i, count in enumerate(histogram["desirable"]) if count} == {10: 1, 17: 2}
    assert {i: count for i, count in enumerate(histogram["undesirable"]) if count} == {2: 1, 10: 1, 17: 1}


@pytest.mark.parametrize("auc_low", [0.4, 0.7])
def test_the_recommendation_is_that_of_matching(auc_low: float) -> None:
    found = _diagnostics(auc_low=auc_low)
    inspection = _inspect(_set(ROWS), p_desirable=P, diagnostics=found)
    weights = summarize_weights(torch.tensor([0.875, 0.5, 0.125]), 0.5, 5.0)
    assert inspection.recommendation == UdmReport(found, weights).recommendation


def test_one_prompt_is_said_to_need_no_matching() -> None:
    rows = _set([("w2 ", f"w{3 + number}", number % 2 == 0) for number in range(8)])
    matching = match_prompts(
        rows, lambda prompts: torch.ones(len(prompts), 3).numpy(), prompt_sample_size=8, seed=0, name="thumbs"
    )
    inspection = _inspect(rows, p_desirable=matching.p_desirable, diagnostics=matching.fit.diagnostics)
    assert "share one prompt" in inspection.recommendation
    assert inspection.prompt_shift is not None
    assert inspection.prompt_shift["most_desirable"] == []
    assert _find(inspection, "All 8 rows answer one prompt.").level == "note"


def test_one_class_stops_training_and_has_nothing_to_match() -> None:
    inspection = _inspect(_set([row for row in ROWS if row[2]]))
    assert inspection.findings[0].level == "stop"
    assert inspection.findings[0].finding == "All 3 rows are desirable."
    assert inspection.recommendation.startswith("UDM is not indicated because all rows are desirable")
    assert (inspection.length_signal.auc, inspection.length_signal.spearman) == (None, None)
    assert _asked(inspection).affected_undesirable is None


def test_findings_come_by_weight_and_say_what_to_do() -> None:
    inspection = _inspect(_set(ROWS * 3 + [ROWS[0]] * 40))
    assert [finding.level for finding in inspection.findings] == ["stop", *["warning"] * 5]
    assert inspection.findings[0].finding.startswith("3 rows (5.2%) have a prompt that alone reaches max_length=4")
    assert inspection.findings[0].action.endswith("trainer.max_length above 4, the tokens of the longest prompt.")
    assert _find(inspection, "cuts the end").action == "Set trainer.max_length=8, which keeps 100% of the rows whole."
    assert "dataset.balance=oversample" in _find(inspection, "Only 16% of the rows are undesirable").action
    assert _find(inspection, "contradict each other").finding.startswith("49 rows (84%)")
    assert _find(inspection, "repeat an earlier row").finding.startswith("53 rows (91%)")


def test_few_worth_rows_after_matching_are_pointed_out() -> None:
    rows = [*ROWS, *[("w20 ", f"w{21 + number}", False) for number in range(9)]]
    p = [*P, *[0.125] * 9]
    inspection = _inspect(_set(rows), p_desirable=p, diagnostics=_diagnostics(), max_density_ratio=50.0)
    worth = (7 + 1 + 10 * 0.5) ** 2 / (49 + 1 + 10 * 0.25) / 12
    assert 0.2 < worth < 0.5
    assert f"worth {worth:.0%} of their number" in _find(inspection, "With UDM").finding


def test_sources_and_what_they_tell() -> None:
    rows = [(f"w{2 + number % 40} ", f"w{3 + number % 50}", number % 4 != 0) for number in range(200)]
    sources = ["a" if number % 4 in (1, 2) else "b" if number % 4 else None for number in range(200)]
    inspection = _inspect(_set(rows, source=sources))
    assert inspection.sources == [
        {"source": "a", "rows": 100, "desirable_share": 1.0},
        {"source": "(not given)", "rows": 50, "desirable_share": 0.0},
        {"source": "b", "rows": 50, "desirable_share": 1.0},
    ]
    assert _find(inspection, "Thumbs differ by source").level == "warning"


def test_many_sources_are_taken_together() -> None:
    rows = [("w2 ", f"w{3 + number}", number % 2 == 0) for number in range(23)]
    found = _inspect(_set(rows, source=[f"model-{number}" for number in range(23)])).sources
    assert len(found) == 21
    assert found[-1] == {"source": "(3 more)", "rows": 3, "desirable_share": pytest.approx(2 / 3)}


def test_times_are_compared_as_moments() -> None:
    times = [
        "2026-01-01T00:30:00+02:00",
        "2025-12-31T23:00:00Z",
        None,
        "yesterday",
        "2026-01-02",
        "2026-01-01T10:00:00",
    ]
    assert _inspect(_set(ROWS, timestamp=times)).times == {
        "first": "2025-12-31T22:30:00+00:00",
        "last": "2026-01-02T00:00:00+00:00",
        "rows": 4,
    }
    assert _inspect(_set(ROWS, timestamp=[None] * 5 + ["soon"])).times is None


def test_messages_are_shown_as_text() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    asked = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w2\nw3"}]
    rows = [(asked, [{"role": "assistant", "content": "w4"}], label) for label in (True, False)]
    inspection = inspect_rows(
        _set(rows),
        tokenizer,
        max_length=64,
        max_completion_length=None,
        truncation="keep_start",
        p_desirable=[0.5, 0.5],
        diagnostics=_diagnostics(),
        min_density_ratio=0.5,
        max_density_ratio=5.0,
        name="chats",
    )
    (example,) = inspection.repeats["contradictions"]["examples"]
    assert (example["prompt"], example["completion"]) == ("w2 w3", "w4")
    assert inspection.prompt_shift is not None
    assert [found["prompt"] for found in inspection.prompt_shift["most_desirable"]] == ["w2 w3"]
    assert inspection.lengths["prompt"]["desirable"]["max"] == 3


def test_the_content_is_json_and_holds_everything() -> None:
    inspection = _inspect(
        _set(ROWS), p_desirable=P, diagnostics=_diagnostics(), loading={"records": 7, "files": ("a",)}
    )
    content = json.loads(json.dumps(inspection.to_dict(), allow_nan=False))
    assert content == inspection.to_dict()
    assert content["loading"] == {"records": 7, "files": ["a"]}
    assert content["truncation"][0]["refused"] == 1
    assert content["findings"][0]["level"] == "stop"
    assert content["settings"]["max_length"] == 4


@pytest.mark.parametrize(("p", "known"), [(P, None), (None, _diagnostics()), (P[:5], _diagnostics())])
def test_half_of_what_matching_needs_is_refused(p: list[float] | None, known: UdmDiagnostics | None) -> None:
    with pytest.raises(ValueError, match=r"thumbs: .* probabilities for 6 rows"):
        _inspect(_set(ROWS), p_desirable=p, diagnostics=known)


def test_a_row_that_cannot_be_tokenised_is_named() -> None:
    rows = _set([*ROWS, ("", "", True)])
    with pytest.raises(ValueError, match=r"thumbs, row 6 \(example_id 16\)"):
        _inspect(rows)


def test_a_limit_is_never_advised_below_the_one_that_cuts() -> None:
    rows = [("w2 ", "w3 " * (40 if number == 0 else 3), number % 2 == 0) for number in range(300)]
    finding = _find(_inspect(_set(rows), max_length=16), "cuts the end of the completion of 1 row")
    assert finding.level == "note"
    assert finding.action == "Set trainer.max_length=32, which keeps 99.7% of the rows whole."


def test_what_cuts_a_row_is_named() -> None:
    rows = [("w2 ", "w3 " * length, up) for length in (2, 9, 30) for up in (True, False)]
    options: dict[str, Any] = {"max_length": 8, "max_completion_length": 5}
    both = _inspect(_set(rows), **(options | {"max_length": 5}))  # 1 + 5 tokens are still too many
    assert _find(both, "max_length=5 cuts").finding == "max_length=5 cuts the end of the completion of 4 rows (67%)."
    assert not [finding for finding in both.findings if "max_completion_length=5" in finding.finding]
    for truncation in ("keep_start", "drop"):
        capped = _inspect(_set(rows), **options, truncation=truncation)
        expected = "max_completion_length=5 cuts the end of the completion of 4 rows (67%)"
        assert _find(capped, "cuts the end").finding.startswith(expected)
    dropped = _inspect(_set(rows), max_length=20, truncation="drop")
    assert _find(dropped, "would be left out").finding.startswith("2 rows (33%) are longer than max_length=20")
    assert not [finding for finding in dropped.findings if "cuts" in finding.finding]
