"""Records out of files and hub data sets, each with its place for errors."""

import csv
import glob
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from datasets import load_dataset, load_from_disk

from bco_lab.data.feedback import RecordError

_COMPRESSED = (".gz", ".bz2", ".xz")
_JSON = (".json", ".jsonl", ".ndjson")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_KINDS = (*_JSON, *_SEPARATORS, ".parquet", ".arrow")
_LONGEST_CELL = 2**31 - 1  # characters; csv's own limit is too low for an answer with a file in it
_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class Place:
    """Where a record stands.

    Attributes:
        file: As the user named it, or the hub data set.
        row: 1-based; the line of a file of JSON lines, else the record.
        unit: "line" or "row".
    """

    file: str
    row: int
    unit: str = "row"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.row}"


Record = Mapping[str, Any] | RecordError
"""A record, or what is wrong with a line that holds none."""


def find_files(path: str | Sequence[str]) -> list[str]:
    """The files that a path, a glob pattern or a list of both stands for, each once.

    Raises:
        FileNotFoundError: One of them matches nothing.
        ValueError: A folder that is not a saved data set, a file of unknown kind, or no text at all.
    """
    patterns = [path] if isinstance(path, str) else list(path) if isinstance(path, Sequence) else []
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"path={path} must be the name of a file, a pattern, or a list of them")
    files: dict[str, None] = {}
    for pattern in patterns:
        try:
            expanded = str(Path(pattern).expanduser())
        except RuntimeError as error:  # ~ of somebody who is not known here
            raise FileNotFoundError(f"{pattern}: {error}") from error
        literal = Path(expanded).exists() or not _GLOB & set(pattern)
        found = [expanded] if literal else sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207 (the pattern may be absolute)
        if not found:
            raise FileNotFoundError(f"{pattern}: no file matches this pattern")
        files |= dict.fromkeys(found)
    for file in files:
        _check_file(file)
    return list(files)


def read_files(files: Sequence[str]) -> Iterator[tuple[int, Place, Record]]:
    """Number, place and content of each record of the files, in order.

    JSON (a list of objects, or one object a line) is read as it stands, so that labels of different types keep them; a
    line that is not JSON comes as the error it is. The number is the 0-based line or record, counted on over all files.

    Raises:
        ValueError: A file that cannot be read as what its name says.
    """
    start = 0
    for file in files:
        last = -1
        for index, place, record in _read_file(file):
            last = index
            yield start + index, place, record
        start += last + 1


def read_hub(
    name: str, *, subset: str | None = None, split: str, revision: str | None = None
) -> Iterator[tuple[int, Place, Record]]:
    """Number, place and content of each record of a data set on the Hugging Face Hub, downloaded once.

    Raises:
        ValueError: It cannot be loaded; the message names it.
    """
    try:
        dataset = load_dataset(name, subset, split=split, revision=revision)
    # The hub, the network and the builders below have errors of their own for every way to fail.
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"the data set {name} (split {split}) cannot be loaded from the hub: {reason}") from error
    for index, record in enumerate(dataset):
        yield index, Place(f"{name}/{split}", index + 1), record


def _check_file(file: str) -> None:
    path = Path(file)
    if path.is_dir():
        if not (path / "state.json").is_file():
            raise ValueError(f"{file} is a folder; name files, such as {file.rstrip('/')}/*.parquet")
        return
    if not path.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if _kind(file) not in _KINDS:
        raise ValueError(f"{file}: files end in {', '.join(_KINDS)}; JSON also in .gz, .bz2 or .xz")


def _kind(file: str) -> str:
    """The suffix that says how to read a file; that of JSON stands before the one of its compression."""
    path = Path(file)
    inner = path.with_suffix("").suffix.lower()
    return inner if path.suffix.lower() in _COMPRESSED and inner in _JSON else path.suffix.lower()


def _read_file(file: str) -> Iterator[tuple[int, Place, Record]]:
    folder = Path(file).is_dir()
    if _kind(file) in _JSON and not folder:
        try:
            yield from _read_json(file)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from error
        return
    try:
        if _kind(file) in _SEPARATORS and not folder:
            yield from _read_csv(file)
            return
        for index, record in enumerate(load_from_disk(file) if folder else _read_table(file)):
            yield index, Place(file, index + 1), record
    # csv, datasets and pyarrow have errors of their own for every way a file can be damaged.
    except Exception as error:
        reason = str(error.__cause__ or error).split("\n", 1)[0]
        raise ValueError(f"{file}: cannot be read as {_kind(file).lstrip('.') or 'a data set'}: {reason}") from error


def _read_table(file: str) -> Iterator[dict[str, Any]]:
    # Streamed: a log is read once, a copy of it in the cache would only cost space.
    builder = _kind(file).removeprefix(".")
    return iter(load_dataset(builder, data_files=[glob.escape(file)], split="train", streaming=True))


def _read_csv(file: str) -> Iterator[tuple[int, Place, Record]]:
    """Everything as text: a completion of digits stays one, and the words None and NA are words.

    Only an empty cell is null. Readers that guess types would make null or a number of them.
    """
    csv.field_size_limit(_LONGEST_CELL)
    with Path(file).open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, delimiter=_SEPARATORS[_kind(file)], strict=True)
        rows = _cells(lines)
        header = next(rows, [])
        repeated = [name for name in header if name and header.count(name) > 1]
        if repeated:
            raise ValueError(f"the column {repeated[0]!r} is there twice")
        for index, row in enumerate(rows):
            place = Place(file, index + 1)
            if len(row) != len(header):
                problem = f"the row has {len(row)} cells where the header has {len(header)}"
                yield index, place, RecordError(None, problem)
                continue
            named = ((name, cell) for name, cell in zip(header, row, strict=True) if name)  # spreadsheets append others
            yield index, place, {name: _messages_or_text(cell) if cell else None for name, cell in named}


def _cells(lines: Any) -> Iterator[list[str]]:
    """Rows of a csv reader that are not blank; what is wrong with the file comes with its line."""
    while True:
        try:
            row = next(lines, None)
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}") from None
        if row is None:
            return
        if any(cell.strip() for cell in row):
            yield row


def _messages_or_text(cell: Any) -> Any:
    """Messages, where a cell of CSV holds them as JSON; any other cell as it is, also one of other JSON."""
    if not isinstance(cell, str) or not cell.startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except ValueError:
        return cell
    chat = isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value)
    return value if chat else cell


def _read_json(file: str) -> Iterator[tuple[int, Place, Record]]:
    with fsspec.open(file, "rb", compression="infer") as stream:
        if _kind(file) == ".json":
            whole = _parse_whole(stream.read())
            if whole is not None:
                yield from ((i, Place(file, i + 1), _as_record(record)) for i, record in enumerate(whole))
                return
            stream.seek(0)
        for number, line in enumerate(stream):
            if line.strip():
                yield number, Place(file, number + 1, "line"), _parse_line(line)


def _parse_whole(content: bytes) -> list[Any] | None:
    """The records of a JSON file that is one value; None where it is one object a line, or no JSON."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return value["data"] if isinstance(value.get("data"), list) else [value]
    return value if isinstance(value, list) else None


def _parse_line(line: bytes) -> Record:
    try:
        return _as_record(json.loads(line.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        return RecordError(None, f"not JSON ({error})")


def _as_record(value: Any) -> Record:
    if isinstance(value, dict):
        return value
    return RecordError(None, f"must be a JSON object with columns, not {json.dumps(value)[:40]!r}")
