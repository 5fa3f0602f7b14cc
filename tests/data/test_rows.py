import pytest
from datasets import List, Value

from bco_lab.data.rows import Row, check_row, check_same_kind, rows_to_dataset, shuffle_row_labels, split_rows

NAMES = {"prompt": "question", "completion": "reply", "label": "rating"}
MESSAGES = Row([{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}], True, 4)


def make_rows(prompts: int, per_prompt: int) -> list[Row]:
    """Distinct completions, labels alternating."""
    count = prompts * per_prompt
    return [Row(f"q{i % prompts}", f"a{i}", (i // prompts + i) % 2 == 0, i) for i in range(count)]


def test_check_row_reads_the_sources_own_columns() -> None:
    record = {"question": "q", "reply": "a", "rating": "down", "other": 1}
    assert check_row(record, columns=NAMES, label_map=None, example_id=8, where="x") == Row("q", "a", False, 8)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, "log, line 2: no column 'reply', 'rating'; the row has: question"),
        ({}, "log, line 2: no column 'question', 'reply', 'rating'; the row has: no columns"),
        (
            {"question": 1, "reply": "a", "rating": 1},
            "log, line 2, column 'question': prompt must be a string or a list",
        ),
        ({"question": "q", "reply": None, "rating": 1}, "log, line 2, column 'reply': completion must be .* not null"),
        ({"question": "q", "reply": "a", "rating": None}, "log, line 2, column 'rating': label None is none of"),
        (
            {"question": "q", "reply": MESSAGES.completion, "rating": 1},
            "log, line 2: prompt is a string but completion",
        ),
    ],
)
def test_check_row_names_place_column_and_rule(record, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_row(record, columns=NAMES, label_map=None, example_id=1, where="log, line 2")


def test_check_same_kind_refuses_a_mixture() -> None:
    check_same_kind(MESSAGES, MESSAGES, column="prompt", where="log, line 9")
    with pytest.raises(ValueError, match=r"of one kind$") as caught:
        check_same_kind(Row("q", "a", True, 8), MESSAGES, column="question", where="log, line 9")
    assert str(caught.value) == (
        "log, line 9, column 'question': a string, but line 5 has a list of messages; all rows must be of one kind"
    )


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


@pytest.mark.parametrize("value", [-0.1, 1.5, "0.5", True, None, float("nan")])
def test_a_number_column_out_of_its_range_is_named(value: object) -> None:
    columns = {"prompt": "prompt", "completion": "completion", "label": "label", "p_desirable": "p"}
    record = {"prompt": "a", "completion": "b", "label": 1, "p": value}
    with pytest.raises(ValueError, match=r"^log, line 3, column 'p': p_desirable=.* must be a number in \[0, 1\]$"):
        check_row(record, columns=columns, label_map=None, example_id=2, where="log, line 3")


def test_number_columns_end_up_in_the_data_set() -> None:
    columns = {"prompt": "prompt", "completion": "completion", "label": "label", "example_weight": "w"}
    records = [{"prompt": "a", "completion": "b", "label": i, "w": 2 * i + 0.5} for i in range(2)]
    rows = [check_row(r, columns=columns, label_map=None, example_id=i, where="log") for i, r in enumerate(records)]
    assert rows_to_dataset(rows)["example_weight"] == [0.5, 2.5]
