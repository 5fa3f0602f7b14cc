import pytest

from bco_lab.app.judge import fit_judge
from bco_lab.app.samples import compare_samples

CHAT = [{"role": "user", "content": "w1 w2 w3"}]


def test_comparison_counts_and_becomes_json() -> None:
    judge = fit_judge(["a lovely film", "a dreadful film"] * 20, [True, False] * 20)
    comparison = compare_samples([CHAT, "w4"], ["dreadful", "lovely"], ["lovely", "so lovely"], judge)
    assert comparison.to_dict() == {
        "count": 2,
        "positive_before": 0.5,
        "positive_after": 1.0,
        "judge_accuracy": 1.0,
        "pairs": [
            {"prompt": "w1 w2 w3", "before": "dreadful", "after": "lovely"},
            {"prompt": "w4", "before": "lovely", "after": "so lovely"},
        ],
    }
    without = compare_samples(["w4"], ["a"], ["b"])
    assert (without.judge_accuracy, without.positive_before, without.positive_after) == (None, None, None)
    with pytest.raises(ValueError, match="got 1 prompts, 1 completions before and 2 after"):
        compare_samples(["w4"], ["a"], ["b", "c"])
