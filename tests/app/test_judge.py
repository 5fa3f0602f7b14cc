"""The judge: its accuracy is the one that can be counted by hand, and it refuses rows it cannot learn from."""

import pytest
from sklearn.model_selection import train_test_split

from bco_lab.app.judge import fit_judge

PRAISE = ["a lovely film", "truly lovely work", "lovely and warm", "such a lovely story", "lovely acting all round"]
BLAME = ["a dreadful film", "truly dreadful work", "dreadful and cold", "such a dreadful story", "dreadful acting"]


def _separable(copies: int) -> tuple[list[str], list[bool]]:
    texts = [f"{text} {number}" for number in range(copies) for text in (*PRAISE, *BLAME)]
    return texts, ([True] * 5 + [False] * 5) * copies


def test_separable_rows_are_all_judged_right() -> None:
    texts, labels = _separable(10)
    judge = fit_judge(texts, labels)
    assert judge.accuracy == 1.0
    assert judge.held_out == 20
    assert judge.positive(["a lovely thing", "what a dreadful thing", "LOVELY"]) == [True, False, True]


def test_wrong_labels_show_in_the_accuracy() -> None:
    """A fifth of each class carries the word of the other: a judge that follows the word is wrong exactly there."""
    texts = ["lovely"] * 80 + ["dreadful"] * 20 + ["dreadful"] * 80 + ["lovely"] * 20
    labels = [True] * 100 + [False] * 100
    judge = fit_judge(texts, labels, held_out_fraction=0.5, seed=3)
    assert judge.positive(["lovely", "dreadful"]) == [True, False]
    _, held_out = train_test_split(range(200), test_size=0.5, stratify=labels, random_state=3)
    right = sum((texts[row] == "lovely") == labels[row] for row in held_out)
    assert 70 < right < 90
    assert (judge.accuracy, judge.held_out) == (right / 100, 100)


def test_share_positive_is_a_share() -> None:
    judge = fit_judge(*_separable(10))
    assert judge.share_positive(["lovely", "lovely one", "dreadful", "so lovely"]) == 0.75
    assert judge.share_positive(["dreadful"]) == 0.0


def test_the_seed_decides_the_judge() -> None:
    texts, labels = _separable(4)
    labels[3], labels[17] = not labels[3], not labels[17]
    first, again = fit_judge(texts, labels, seed=1), fit_judge(texts, labels, seed=1)
    assert first.accuracy == again.accuracy
    assert (first.classifier[-1].coef_ == again.classifier[-1].coef_).all()


def test_an_empty_list_has_no_share() -> None:
    judge = fit_judge(*_separable(4))
    assert judge.positive([]) == []
    with pytest.raises(ValueError, match="cannot judge an empty list of texts"):
        judge.share_positive([])


@pytest.mark.parametrize(
    ("texts", "labels", "fraction", "message"),
    [
        (["good", "bad"] * 9, [True, False] * 9, 0.2, "at least 20 rows to be fitted and measured, got 18"),
        (["good"] * 30, [True] * 30, 0.2, "two rows of each class, got 30 positive and 0 negative"),
        (["good"] * 30, [True] * 29, 0.2, "got 30 texts but 29 labels"),
        (["good", "bad"] * 10, [True, False] * 10, 0.05, "held_out_fraction=0.05 of 20 rows must leave at least two"),
    ],
)
def test_rows_it_cannot_learn_from(texts: list[str], labels: list[bool], fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_judge(texts, labels, held_out_fraction=fraction)
