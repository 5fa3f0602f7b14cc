import gzip
import json
from collections import Counter

import pytest
from datasets import Dataset

from bco_lab.data.shapes import Unpaired
from bco_lab.data.sources import FeedbackData


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def record(number: int, **values) -> dict[str, object]:
    return {"prompt": f"q{number}", "completion": f"a{number}", "label": number % 2 == 0} | values


def load(**arguments) -> FeedbackData:
    return Unpaired(**arguments).load()


def test_rows_are_read_and_split_by_prompt(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i // 2, completion=f"a{i}", label=i % 2) for i in range(40)])
    data = load(path=path, eval_fraction=0.1)
    assert (len(data.train), len(data.eval), data.judge) == (36, 4, None)
    assert (data.name, data.split_by) == ("log", "prompt")
    assert not set(data.train["prompt"]) & set(data.eval["prompt"])
    for row in [*data.train, *data.eval]:
        i = row["example_id"]
        assert row == {
            "prompt": f"q{i // 2}",
            "completion": f"a{i}",
            "label": i % 2 == 1,
            "example_id": i,
            "origin": f"{path}, line {i + 1}",
        }


def test_one_prompt_is_split_by_completion(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i, prompt="q") for i in range(20)])
    data = load(path=path, eval_fraction=0.2)
    assert data.split_by == "completion"
    assert sum(data.eval["label"]) == 2
    assert not set(data.train["completion"]) & set(data.eval["completion"])


def test_blank_lines_are_passed_over_and_ids_are_still_line_numbers(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\ufeff" + json.dumps(record(0)) + "\n\n  \n" + json.dumps(record(1, prompt="é")), encoding="utf-8")
    data = load(path=str(path), eval_fraction=0)
    assert data.eval is None
    assert data.train["example_id"][:] == [0, 3]
    assert data.train["prompt"][:] == ["q0", "é"]


def test_column_names_and_label_words_of_the_file(tmp_path) -> None:
    path = write(
        tmp_path / "log.jsonl", [{"in": "q", "completion": "a", "stars": 5}, {"in": "r", "completion": "b", "stars": 1}]
    )
    columns = {"prompt": "in", "label": "stars"}
    data = load(path=path, columns=columns, label_map={"5": True, 1: False}, eval_fraction=0)
    assert data.train["prompt"][:] == ["q", "r"]
    assert data.train["label"][:] == [True, False]
    with pytest.raises(
        ValueError, match=r"line 1, column 'stars': label 5 is not a key of label_map, which has: 4, 1$"
    ):
        load(path=path, columns=columns, label_map={4: True, 1: False})


def test_messages_are_read(tmp_path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "completion": [{"role": "assistant", "content": "a"}],
            "label": i,
        }
        for i in range(2)
    ]
    assert load(path=write(tmp_path / "log.jsonl", rows), eval_fraction=0).train.remove_columns(
        ["example_id", "origin"]
    ).to_list() == [row | {"label": bool(row["label"])} for row in rows]


def test_a_second_file_is_the_evaluation(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i) for i in range(6)])
    other = write(tmp_path / "eval.jsonl", [record(i) for i in range(10, 13)])
    data = load(path=path, eval_path=other, eval_fraction=0.5)
    assert data.split_by == "file"
    assert data.train["completion"][:] == [f"a{i}" for i in range(6)]
    assert data.eval["completion"][:] == ["a10", "a11", "a12"]
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file"):
        load(path=path, eval_path=str(tmp_path / "none.jsonl"))


def test_a_second_file_must_be_of_the_same_kind(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i) for i in range(6)])
    said = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    other = write(tmp_path / "eval.jsonl", [said | {"label": i} for i in range(2)])
    with pytest.raises(ValueError, match=r"eval.jsonl, line 1, column 'prompt': a list of messages, but .*log"):
        load(path=path, eval_path=other)


def test_max_rows_samples_both_classes_and_keeps_the_order(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i, label=i < 90) for i in range(100)])
    data = load(path=path, max_rows=10, eval_fraction=0)
    assert (len(data.train), sum(data.train["label"])) == (10, 9)
    assert data.train["example_id"][:] == sorted(data.train["example_id"])
    assert load(path=path, max_rows=10, eval_fraction=0, seed=1).train["example_id"][:] != data.train["example_id"][:]
    with pytest.raises(ValueError, match=r"^max_rows=1 must be at least 2"):
        load(path=path, max_rows=1)


def test_shuffled_labels_are_a_permutation_within_each_part(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i) for i in range(200)])
    true, control = load(path=path), load(path=path, shuffle_labels=True)
    for part in ("train", "eval"):
        a, b = getattr(true, part), getattr(control, part)
        assert a["example_id"][:] == b["example_id"][:]
        assert sum(a["label"]) == sum(b["label"])
        assert a["label"][:] != b["label"][:]


GOOD = [record(0), record(1)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "the file has no rows$"),
        ([*GOOD, {"prompt": "q", "label": 1}], ", line 3: no column 'completion'; the row has: prompt, label$"),
        ([*GOOD, record(2, label="meh")], ", line 3, column 'label': label 'meh' is none of true/false"),
        ([*GOOD, record(2, prompt=7)], ", line 3, column 'prompt': prompt must be a string or a list .* not int 7$"),
        (
            [*GOOD, record(2, completion={})],
            ", line 3, column 'completion': completion must be a string or a list .* not dict",
        ),
        (
            [
                *GOOD,
                record(
                    2, prompt=[{"role": "user", "content": "q"}], completion=[{"role": "assistant", "content": "a"}]
                ),
            ],
            ", line 3, column 'prompt': a list of messages, but .*log.jsonl, line 1 has a string; all ",
        ),
        ([*GOOD, ["q", "a", 1]], ", line 3: must be a JSON object"),
        (
            [*GOOD, record(2, prompt="x\ud800")],
            ", line 3, column 'prompt': prompt holds .*, half of a character, at pos",
        ),
        ([record(0), record(2)], ": only one class present, all 2 labels are desirable; add undesirable rows$"),
        ([record(0, label=0), record(1, label=-1), record(2, label=1)], ", column 'label': both 0 and -1 occur"),
    ],
)
def test_errors_name_file_line_column_and_rule(tmp_path, records, message) -> None:
    path = write(tmp_path / "log.jsonl", records)
    with pytest.raises(ValueError, match=message) as caught:
        load(path=path)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_broken_lines_are_named(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(record(0)) + '\n{"prompt": "q", \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"log.jsonl, line 2: not JSON \(Expecting property name"):
        load(path=str(path))
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 1: not JSON \('utf-8' codec can't decode"):
        load(path=str(path))


def test_a_missing_file_and_wrong_arguments_are_errors(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file$"):
        load(path=str(tmp_path / "none.jsonl"))
    path = write(tmp_path / "log.jsonl", GOOD)
    for fraction in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"^eval_fraction={fraction} must be in \[0, 1\)$"):
            load(path=path, eval_fraction=fraction)
    with pytest.raises(ValueError, match=r"^columns has 'rating'; its keys are prompt, completion, label, example_we"):
        Unpaired(path=path, columns={"rating": "label"})


# --- what every source does


def test_rows_without_a_thumb_are_left_out_and_counted(tmp_path) -> None:
    labels = [1, None, 0, "", float("nan"), 0]
    path = write(tmp_path / "log.jsonl", [record(i, label=label) for i, label in enumerate(labels)])
    data = load(path=path, eval_fraction=0)
    assert data.train["example_id"][:] == [0, 2, 5]
    assert data.report.left_out == {"no label": 3}
    assert (data.report.records, data.report.rows) == (6, 3)
    path = write(tmp_path / "none.jsonl", [record(0, label=None)])
    with pytest.raises(ValueError, match=r"none.jsonl: the file has no rows that can be used \(1 records: no label\)$"):
        load(path=path)


def test_bad_rows_can_be_skipped(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    bad = [record(2, label="meh"), {"prompt": "q", "label": 1}]
    write(path, [record(0), *bad, record(1)])
    path.write_text(path.read_text() + "{\n")
    data = load(path=str(path), on_error="skip", eval_fraction=0)
    assert data.train["example_id"][:] == [0, 3]
    assert (data.report.records, data.report.rejected) == (5, 3)
    found = [(each["line"], each["column"], each["record"]) for each in data.rejected]
    assert found == [(2, "label", bad[0]), (3, None, bad[1]), (5, None, None)]
    assert data.rejected[0]["file"] == str(path)
    assert data.rejected[0]["rule"].startswith("label 'meh' is none of")
    write(path, bad)
    with pytest.raises(ValueError, match=r"can be used \(2 rejected, the first: .*log.jsonl, line 1, column 'label'"):
        load(path=str(path), on_error="skip")


def test_repeats_and_prompts_are_counted(tmp_path) -> None:
    records = [record(i % 10) for i in range(30)] + [record(0, label=0)]
    report = load(path=write(tmp_path / "log.jsonl", records)).report
    assert (report.rows, report.desirable, report.prompts) == (31, 15, 10)
    assert (report.duplicates, report.contradictions, report.split_by) == (20, 1, "prompt")
    assert report.to_dict()["files"] == [str(tmp_path / "log.jsonl")]


def test_training_rows_can_be_balanced(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i, label=i % 4 == 0) for i in range(40)])
    plain, balanced = load(path=path), load(path=path, balance="oversample")
    assert balanced.eval.to_dict() == plain.eval.to_dict()
    assert sum(balanced.train["label"]) * 2 == len(balanced.train)
    assert balanced.report.oversampled == len(balanced.train) - len(plain.train)
    assert balanced.train.select(range(len(plain.train))).to_dict() == plain.train.to_dict()
    repeated = Counter(
        prompt for prompt, up in zip(balanced.train["prompt"], balanced.train["label"], strict=True) if up
    )
    assert set(repeated) == {row["prompt"] for row in plain.train if row["label"]}


def test_strings_can_become_chats(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i) for i in range(2)])
    data = load(path=path, chat=True, system="Be brief.", eval_fraction=0)
    assert data.train["prompt"][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q0"},
    ]
    assert data.train["completion"][1] == [{"role": "assistant", "content": "a1"}]


def test_several_files_of_several_kinds_are_one_log(tmp_path) -> None:
    write(tmp_path / "1.jsonl", [record(i) for i in range(3)])
    Dataset.from_list([record(i) for i in range(3, 6)]).to_parquet(str(tmp_path / "2.parquet"))
    (tmp_path / "3.jsonl.gz").write_bytes(gzip.compress(json.dumps(record(6)).encode()))
    data = load(path=[str(tmp_path / "*.jsonl"), str(tmp_path / "2.parquet"), str(tmp_path / "3.*")], eval_fraction=0)
    assert data.train["example_id"][:] == list(range(7))
    assert data.train["prompt"][:] == [f"q{i}" for i in range(7)]
    assert data.train["origin"][4] == f"{tmp_path / '2.parquet'}, row 2"
    assert data.name == "1 and 2 more"
    with pytest.raises(ValueError, match=r"2.parquet, row 1, column 'label': label False is not a key of label_map"):
        load(path=str(tmp_path / "2.parquet"), label_map={"up": True})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "path=null must be a file, a pattern or a list of them, unless hub names a data set"),
        ({"path": 3}, "path=3 must be the name of a file"),
        ({"path": "a.csv", "balance": "up"}, "balance=up must be one of none, oversample"),
        ({"path": "a.csv", "on_error": "stop"}, "on_error=stop must be one of raise, skip"),
        ({"path": "a.csv", "system": "Hi"}, "system needs chat=true"),
        ({"path": "a.csv", "max_rows": "5"}, "max_rows=5 must be at least 2"),
        ({"path": "a.csv", "eval_fraction": "a"}, r"eval_fraction=a must be in \[0, 1\)"),
        ({"path": "a.csv", "seed": None}, "seed=None must be a whole number >= 0"),
        ({"path": "a.csv", "chat": "yes"}, "chat=yes must be true or false"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_read(arguments, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Unpaired(**arguments)
