from collections import Counter
from dataclasses import replace

import pytest
from datasets import List, Value

from bco_lab.data.feedback import Feedback, RecordError
from bco_lab.data.rows import (
    Row,
    check_feedback,
    check_same_kind,
    count_repeats,
    oversample_rows,
    rows_to_dataset,
    shuffle_row_labels,
    split_rows,
)

NAMES = {"prompt": "question", "completion": "reply", "label": "rating"}
MESSAGES = Row([{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}], True, 4)


def make_rows(prompts: int, per_prompt: int) -> list[Row]:
    """Distinct completions, labels alternating."""
    count = prompts * per_prompt
    return [Row(f"q{i % prompts}", f"a{i}", (i // prompts + i) % 2 == 0, i) for i in range(count)]


def check(prompt, completion, label, **numbers) -> Row:
    said = Feedback(prompt, completion, label, numbers=numbers)
    return check_feedback(said, example_id=8, origin="log, line 9", label_map=None, names=NAMES)


def test_a_thumb_becomes_a_row() -> None:
    assert check("q", "a", "down") == Row("q", "a", False, 8, origin="log, line 9")


def test_messages_keep_role_and_content_alone() -> None:
    row = check([{"role": "user", "content": "q", "name": None}], [{"role": "assistant", "content": "a"}], 1)
    assert row.prompt == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("said", "column", "rule"),
    [
        ((1, "a", 1), "question", "prompt must be a string or a list of at least one message, not int 1"),
        (("q", None, 1), "reply", "completion must be a string or a list of at least one message, not null"),
        (("q", "a", "meh"), "rating", "label 'meh' is none of true/false"),
        (("q", MESSAGES.completion, 1), None, "prompt is a string but completion is a list of messages"),
    ],
)
def test_a_thumb_that_breaks_a_rule_names_column_and_rule(said, column, rule) -> None:
    with pytest.raises(RecordError) as caught:
        check(*said)
    assert caught.value.column == column
    assert caught.value.rule.startswith(rule)


def test_check_same_kind_refuses_a_mixture() -> None:
    first = replace(MESSAGES, origin="log, line 5")
    check_same_kind(first, first, column="prompt")
    with pytest.raises(RecordError) as caught:
        check_same_kind(Row("q", "a", True, 8), first, column="question")
    assert str(caught.value) == (
        "column 'question': a string, but log, line 5 has a list of messages; all rows must be of one kind"
    )


def test_repeats_are_counted() -> None:
    said = [
        ("q", "a", True),
        ("q", "a", True),
        ("q", "a", False),
        ("q", "b", False),
        ("r", "a", True),
        ("q", "a", True),
    ]
    rows = [Row(*each, i) for i, each in enumerate(said)]
    assert count_repeats(rows) == (2, 1)  # the second and the last row; (q, a)


def test_oversampling_repeats_the_smaller_class() -> None:
    rows = [Row("q", f"a{i}", i < 3, i) for i in range(11)]
    balanced = oversample_rows(rows, seed=0)
    assert balanced[:11] == rows
    copies = balanced[11:]
    assert sum(row.label for row in balanced) == 8 == len(balanced) - 8
    assert len({row.example_id for row in balanced}) == len(balanced)
    assert all(row.completion == f"a{row.example_id % 11}" for row in copies)
    assert sorted(Counter(row.completion for row in balanced if row.label).values()) == [2, 3, 3]


def test_many_prompts_are_split_by_prompt() -> None:
    train, held_out, split_by = split_rows(make_rows(20, 4), eval_fraction=0.1, seed=0, name="log")
    assert split_by == "prompt"
    assert (len(train), len(held_out)) == (72, 8)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert {row.label for row in held_out} == {True, False}


def test_few_prompts_are_split_by_completion() -> None:
    rows = make_rows(2, 30)
    repeated = [*rows, *(Row(row.prompt, row.completion, row.label, 60 + i) for i, row in enumerate(rows))]
    train, held_out, split_by = split_rows(repeated, eval_fraction=0.1, seed=0, name="log")
    assert split_by == "completion"
    assert (len(train), len(held_out)) == (108, 12)
    assert not {row.completion for row in train} & {row.completion for row in held_out}
    assert split_rows(repeated, eval_fraction=0.5, seed=0, name="log")[2] == "prompt"


def test_prompts_that_cannot_give_both_sides_both_classes_are_split_by_completion() -> None:
    rows = [Row(f"q{i}" if i else "all down", f"a{i}", i > 0, i) for i in range(20)]
    rows += [Row("all down", f"b{i}", False, 20 + i) for i in range(20)]
    train, held_out, split_by = split_rows(rows, eval_fraction=0.2, seed=0, name="log")
    assert split_by == "completion"
    assert {row.label for row in train} == {row.label for row in held_out} == {True, False}


def test_a_share_that_holds_out_nothing_is_an_error() -> None:
    rows = [Row("q", "a", True, 0), Row("q", "b", False, 1)]
    with pytest.raises(
        ValueError, match=r"^log: eval_fraction=0.1 holds out none of 2 rows, .* or set eval_fraction=0$"
    ):
        split_rows(rows, eval_fraction=0.1, seed=0, name="log")
    assert split_rows(rows, eval_fraction=0, seed=0, name="log")[:2] == (rows, [])


def test_shuffled_labels_change_only_labels() -> None:
    rows = make_rows(20, 4)
    shuffled = shuffle_row_labels(rows, seed=0)
    assert [(row.prompt, row.completion, row.example_id) for row in shuffled] == [
        (row.prompt, row.completion, row.example_id) for row in rows
    ]
    assert sum(row.label for row in shuffled) == sum(row.label for row in rows)
    assert [row.label for row in shuffled] != [row.label for row in rows]


def test_data_sets_have_explicit_types() -> None:
    strings = rows_to_dataset([Row("q", "a", False, 3)])
    assert strings[0] == {"prompt": "q", "completion": "a", "label": False, "example_id": 3}
    assert strings.features["example_id"] == Value("int64")
    messages = rows_to_dataset([MESSAGES])
    assert messages.features["prompt"] == List({"role": Value("string"), "content": Value("string")})
    assert messages[0]["completion"] == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("value", [-0.1, 1.5, "x", "nan", True, None, float("nan")])
def test_a_number_column_out_of_its_range_is_named(value: object) -> None:
    with pytest.raises(RecordError, match=r"^column 'p_desirable': p_desirable=.* must be a number in \[0, 1\]$"):
        check("a", "b", 1, p_desirable=value)


def test_number_columns_end_up_in_the_data_set() -> None:
    rows = [check("a", "b", i, example_weight=weight) for i, weight in enumerate([0.5, "2.5"])]
    assert rows_to_dataset(rows)["example_weight"] == [0.5, 2.5]


def test_notes_are_columns_where_a_row_has_them() -> None:
    rows = [Row("q", "a", True, 0, source="m"), Row("q", "b", True, 1, timestamp="2026-01-02")]
    assert rows_to_dataset(rows).remove_columns(["prompt", "completion", "label", "example_id"]).to_list() == [
        {"source": "m", "timestamp": None},
        {"source": None, "timestamp": "2026-01-02"},
    ]
