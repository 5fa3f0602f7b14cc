import json

import pytest

from bco_lab.data.feedback import RecordError
from bco_lab.data.shapes import Paired, Rated, Unpaired, look_up


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def rows(source, *columns: str) -> list[tuple[object, ...]]:
    data = source.load()
    assert data.eval is None
    return [tuple(row[column] for column in columns) for row in data.train]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# --- unpaired


def test_columns_may_be_nested_and_notes_are_kept(tmp_path) -> None:
    records = [
        {"in": "q", "out": {"text": f"a{i}"}, "thumb.value": i, "meta": {"model": f"m{i}", "at": 1700000000}}
        for i in range(2)
    ]
    columns = {"prompt": "in", "completion": "out.text", "label": "thumb.value", "source": "meta.model"}
    source = Unpaired(
        path=write(tmp_path / "log.jsonl", records), columns=columns | {"timestamp": "meta.at"}, eval_fraction=0
    )
    assert rows(source, "prompt", "completion", "label", "source", "timestamp") == [
        ("q", "a0", False, "m0", "1700000000"),
        ("q", "a1", True, "m1", "1700000000"),
    ]


def test_a_path_into_null_is_null_and_one_into_nothing_an_error() -> None:
    record = {"a": {"b": 1}, "n": None, "x.y": 2}
    assert look_up(record, {"one": "a.b", "two": "n.b.c", "three": "x.y"}) == {"one": 1, "two": None, "three": 2}
    with pytest.raises(RecordError, match=r"^no column 'a.c', 'z'; the row has: a, n, x.y$"):
        look_up(record, {"one": "a.c", "two": "z", "three": "a"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"columns": {"rating": "label"}},
            "columns has 'rating'; its keys are prompt, completion, label, example_weig",
        ),
        ({"columns": {"example_weight": "w", "p_desirable": "p"}}, "columns has example_weight and p_desirable: a row"),
        ({"columns": {"label": 3}}, r"columns\.label=3 must be the name of a column"),
        ({"columns": "label"}, r"columns=label must be a map, such as \{prompt: question\}"),
        ({"label_map": {"up": "yes"}}, r"label_map\.up=yes must be true or false"),
        ({"label_map": {1: True, "1": False}}, "label_map has 1 twice, with both labels"),
    ],
)
def test_wrong_maps_are_named_before_anything_is_read(arguments, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Unpaired(path="none.jsonl", **arguments)


# --- paired


def test_a_pair_becomes_two_rows(tmp_path) -> None:
    log = write(
        tmp_path / "log.jsonl",
        [{"question": "q0", "good": " a", "bad": " b"}, {"question": "q1", "good": " c", "bad": " d"}],
    )
    source = Paired(path=log, prompt="question", chosen="good", rejected="bad", eval_fraction=0)
    assert rows(source, "prompt", "completion", "label", "example_id") == [
        ("q0", " a", True, 0),
        ("q0", " b", False, 1),
        ("q1", " c", True, 2),
        ("q1", " d", False, 3),
    ]


def test_the_prompt_of_transcripts_is_what_they_share(tmp_path) -> None:
    start = "\n\nHuman: Hi there\n\nAssistant:"
    log = write(tmp_path / "log.jsonl", [{"chosen": f"{start} Hello!", "rejected": f"{start} Help yourself."}])
    assert rows(Paired(path=log, eval_fraction=0), "prompt", "completion") == [
        (start, " Hello!"),
        (start, " Help yourself."),
    ]
    assert rows(Paired(path=log, eval_fraction=0, chat=True), "prompt", "completion") == [
        ([{"role": "user", "content": "Hi there"}], said("Hello!")),
        ([{"role": "user", "content": "Hi there"}], said("Help yourself.")),
    ]


def test_a_prompt_of_text_beside_conversations_is_not_repeated(tmp_path) -> None:
    """The shape of ultrafeedback_binarized."""
    user = {"role": "user", "content": "q"}
    record = {"prompt": "q", "chosen": [user, *said("a")], "rejected": [user, *said("b")], "score_chosen": 8.0}
    source = Paired(path=write(tmp_path / "log.jsonl", [record]), eval_fraction=0)
    assert rows(source, "prompt", "completion") == [([user], said("a")), ([user], said("b"))]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"good": "a"}, ", line 2: no column 'bad'; the row has: good"),
        ({"good": "a", "bad": None}, ", line 2, column 'bad': rejected must be a string or a list .* not null"),
        ({"good": "a", "bad": "a"}, ", line 2: chosen and rejected are equal"),
    ],
)
def test_a_bad_pair_names_the_logs_own_column(tmp_path, record, message) -> None:
    log = write(tmp_path / "log.jsonl", [{"good": "a", "bad": "b"}, record])
    with pytest.raises(ValueError, match=message) as caught:
        Paired(path=log, chosen="good", rejected="bad").load()
    assert str(caught.value).startswith(log)


# --- rated


def test_scores_from_the_threshold_on_are_desirable(tmp_path) -> None:
    """The shape of HelpSteer2, its scores from 0 to 4."""
    scores = [4, 3, 2, 1, 0, None]
    log = write(
        tmp_path / "log.jsonl",
        [{"prompt": "q", "response": f"a{i}", "helpfulness": score} for i, score in enumerate(scores)],
    )
    wanted = {"path": log, "completion": "response", "score": "helpfulness", "threshold": 4, "eval_fraction": 0}
    assert rows(Rated(**wanted), "completion", "label") == [
        ("a0", True),
        ("a1", False),
        ("a2", False),
        ("a3", False),
        ("a4", False),
    ]
    data = Rated(**wanted, drop_from=2).load()
    assert data.train["completion"][:] == ["a0", "a3", "a4"]
    assert data.report.left_out == {"score from 2 to below 4": 2, "no label": 1}
    assert (data.report.records, data.report.rows, data.report.desirable) == (6, 3, 1)


def test_each_of_a_list_of_completions_is_rated(tmp_path) -> None:
    """The shape of UltraFeedback."""
    completions = [
        {"model": "m0", "response": "a", "overall_score": 8.5},
        {"model": "m1", "response": "b", "overall_score": "N/A"},
        {"model": "m2", "response": "c", "overall_score": "3"},
    ]
    log = write(tmp_path / "log.jsonl", [{"instruction": f"q{i}", "completions": completions} for i in range(2)])
    source = Rated(
        path=log,
        prompt="instruction",
        completions="completions",
        completion="response",
        score="overall_score",
        source="model",
        threshold=7,
        eval_fraction=0,
    )
    assert rows(source, "prompt", "completion", "label", "source", "example_id") == [
        ("q0", "a", True, "m0", 0),
        ("q0", "c", False, "m2", 1),
        ("q1", "a", True, "m0", 2),
        ("q1", "c", False, "m2", 3),
    ]


def test_wrong_scores_and_bounds_are_errors(tmp_path) -> None:
    log = write(tmp_path / "log.jsonl", [{"prompt": "q", "completion": "a", "score": "high"}])
    with pytest.raises(ValueError, match=r"line 1, column 'score': score 'high' must be a number$"):
        Rated(path=log, threshold=4).load()
    with pytest.raises(ValueError, match=r"line 1, column 'score': must be a list of completions"):
        Rated(path=log, threshold=4, completions="score").load()
    with pytest.raises(ValueError, match=r"^drop_from=4 must be below threshold=4, or null$"):
        Rated(path=log, threshold=4, drop_from=4)
    for threshold in ("high", None, True, float("nan")):
        with pytest.raises(ValueError, match=rf"^threshold={threshold} must be a number$"):
            Rated(path=log, threshold=threshold)
    with pytest.raises(ValueError, match=r"^score=5 must be a name$"):
        Rated(path=log, threshold=4, score=5)


def test_a_prompt_column_that_was_asked_for_must_be_there(tmp_path) -> None:
    log = write(tmp_path / "log.jsonl", [{"question": "q", "chosen": " a", "rejected": " b"}])
    assert rows(Paired(path=log, eval_fraction=0), "prompt") == [("",), ("",)]
    with pytest.raises(ValueError, match=r"line 1: no column 'promt'; the row has: question, chosen, rejected$"):
        Paired(path=log, prompt="promt").load()
    with pytest.raises(ValueError, match=r"^chosen=None must be a name$"):
        Paired(path=log, chosen=None)
