import bz2
import gzip
import json
import lzma

import pandas as pd
import pytest
from datasets import Dataset

from bco_lab.data.feedback import RecordError
from bco_lab.data.tables import Place, find_files, read_files, read_hub

RECORDS = [
    {"prompt": 'q, "x"', "completion": "a\nb", "label": "1"},
    {"prompt": "NA", "completion": "007", "label": None},
    {"prompt": "[not messages]", "completion": "[1]", "label": "-1"},
]


def read(path) -> list[tuple[int, Place, object]]:
    return list(read_files(find_files(path)))


def records(path) -> list[object]:
    return [record for _number, _place, record in read(str(path))]


def test_every_kind_of_file_gives_the_same_records(tmp_path) -> None:
    frame, dataset = pd.DataFrame(RECORDS), Dataset.from_list(RECORDS)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t", encoding="utf-8-sig")
    frame.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=1))
    (tmp_path / "page.json").write_text(json.dumps({"data": RECORDS, "meta": {"page": 1}}))
    for suffix, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        (tmp_path / f"b.jsonl{suffix}").write_bytes(module.compress(lines.encode()))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    found = [*tmp_path.glob("a.*"), *tmp_path.glob("*.json"), *tmp_path.glob("b.*"), tmp_path / "saved", arrow]
    assert len(found) == 13
    for path in found:
        assert records(path) == RECORDS, path


def test_rows_of_another_width_are_errors_of_their_own(tmp_path) -> None:
    (tmp_path / "a.csv").write_text(" \na,b,,\n1,2,,\n1,2,,,3\n\n1\n , \n4,5,,\n")
    found = records(tmp_path / "a.csv")
    assert [found[0], found[3]] == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]
    assert [str(each) for each in found[1:3]] == [
        "the row has 5 cells where the header has 4",
        "the row has 1 cells where the header has 4",
    ]


def test_messages_in_a_cell_of_csv_are_messages(tmp_path) -> None:
    messages = [{"role": "user", "content": "q"}]
    pd.DataFrame([{"prompt": json.dumps(messages), "n": 3}]).to_csv(tmp_path / "a.csv", index=False)
    assert records(tmp_path / "a.csv") == [{"prompt": messages, "n": "3"}]


def test_records_are_numbered_over_all_files(tmp_path) -> None:
    (tmp_path / "1.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "2.json").write_text('[{"a": 3}]')
    pattern = str(tmp_path / "*.json*")
    one, two = str(tmp_path / "1.jsonl"), str(tmp_path / "2.json")
    assert read(pattern) == [
        (0, Place(one, 1, "line"), {"a": 1}),
        (2, Place(one, 3, "line"), {"a": 2}),
        (3, Place(two, 1, "row"), {"a": 3}),
    ]
    assert find_files([two, pattern]) == [two, one]
    assert (str(Place(one, 1, "line")), str(Place(two, 1))) == (f"{one}, line 1", f"{two}, row 1")


def test_a_line_that_is_no_record_comes_as_its_error(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": \n[1]\n{"a": "\xff"}\n{"a": 1}')
    found = records(path)
    assert [type(each) for each in found] == [RecordError, RecordError, RecordError, dict]
    assert [str(each) for each in found[:2]] == [
        "not JSON (Expecting value: line 2 column 1 (char 7))",
        "must be a JSON object with columns, not '[1]'",
    ]


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.parquet").write_text("PAR0")
    (tmp_path / "bad.csv").write_text('a,b\n1,"2')
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError, match=r"^bad.csv: cannot be read as csv: line 2: unexpected end of data$"):
        read("bad.csv")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no")
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b"{}" * 99)[:-9])
    for path in ("bad.jsonl.gz", "cut.jsonl.xz"):
        with pytest.raises(ValueError, match=rf"^{path}: cannot be read: "):
            read(path)
    (tmp_path / "twice.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ValueError, match=r"^twice.csv: cannot be read as csv: the column 'a' is there twice$"):
        read("twice.csv")
    for path, kind in (("bad.parquet", "parquet"), ("bad.csv", "csv")):
        with pytest.raises(ValueError, match=rf"^{path}: cannot be read as {kind}: "):
            read(path)
    for path, kind, message in (
        ("none.csv", FileNotFoundError, "none.csv: no such file"),
        ("x*.csv", FileNotFoundError, r"x\*.csv: no file matches this pattern"),
        (
            "notes.txt",
            ValueError,
            "notes.txt: files end in .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow; JSON ",
        ),
        (str(tmp_path), ValueError, r".* is a folder; name files, such as .*/\*.parquet"),
        ("~nobody-here/a.csv", FileNotFoundError, "~nobody-here/a.csv: "),
        (5, ValueError, "path=5 must be the name of a file"),
        ([], ValueError, r"path=\[\] must be the name of a file, a pattern, or a list of them"),
        (["bad.csv", 3], ValueError, "path=.* must be the name of a file"),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            find_files(path)


def test_a_data_set_by_name_is_read_by_split(tmp_path, monkeypatch) -> None:
    """A folder laid out like a data set's repository stands in for the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "repository" / "data"
    repository.mkdir(parents=True)
    Dataset.from_list(RECORDS).to_parquet(str(repository / "train-0.parquet"))
    Dataset.from_list(RECORDS[:1]).to_parquet(str(repository / "validation-0.parquet"))
    name = str(repository.parent)
    assert [record for _n, _p, record in read_hub(name, split="train")] == RECORDS
    assert list(read_hub(name, split="validation")) == [(0, Place(f"{name}/validation", 1), RECORDS[0])]
    with pytest.raises(ValueError, match=r"^the data set .*/repository \(split test\) cannot be loaded from the hub: "):
        list(read_hub(name, split="test"))
