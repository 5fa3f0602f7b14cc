"""The steps that all sources share: check rows, split them, make a data set of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, Features, List, Value

from bco_lab.data.chat import check_pair, check_text
from bco_lab.data.labels import parse_label
from bco_lab.data.splits import can_split, group_split, permute_labels

COLUMNS = ("prompt", "completion", "label")
OPTIONAL_COLUMNS = ("example_weight", "p_desirable")  # numbers that a log may bring: see bco_lab.data.weights


@dataclass(frozen=True)
class Row:
    """One checked row of feedback."""

    prompt: str | list[dict[str, str]]
    completion: str | list[dict[str, str]]
    label: bool
    example_id: int
    numbers: dict[str, float] = field(default_factory=dict)  # of OPTIONAL_COLUMNS, those that the source maps


def check_row(
    record: Mapping[str, Any],
    *,
    columns: Mapping[str, str],
    label_map: Mapping[Any, bool] | None,
    example_id: int,
    where: str,
) -> Row:
    """Check one record of a source and read its label.

    Args:
        record: Column to value.
        columns: Our name of each column to the source's.
        label_map: See `parse_label`.
        example_id: The record's 0-based place in the source.
        where: File and line, for errors.

    Raises:
        ValueError: Names place, column and rule.
    """
    missing = [theirs for theirs in columns.values() if theirs not in record]
    if missing:
        found = ", ".join(record) or "no columns"
        raise ValueError(f"{where}: no column {', '.join(map(repr, missing))}; the row has: {found}")
    prompt, completion, label = (record[columns[ours]] for ours in COLUMNS)
    for ours, value in (("prompt", prompt), ("completion", completion)):
        try:
            check_text(value, ours)
        except ValueError as error:
            raise ValueError(f"{where}, column {columns[ours]!r}: {error}") from error
    try:
        check_pair(prompt, completion)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    numbers = {
        ours: _check_number(record[columns[ours]], ours, f"{where}, column {columns[ours]!r}")
        for ours in OPTIONAL_COLUMNS
        if ours in columns
    }
    try:
        return Row(prompt, completion, parse_label(label, label_map=label_map), example_id, numbers)
    except ValueError as error:
        raise ValueError(f"{where}, column {columns['label']!r}: {error}") from error


def _check_number(value: Any, ours: str, where: str) -> float:
    largest = 1.0 if ours == "p_desirable" else math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest or value == math.inf:
        raise ValueError(f"{where}: {ours}={value!r} must be a number in [0, {'1]' if largest == 1 else 'infinity)'}")
    return float(value)


def check_same_kind(row: Row, first: Row, *, column: str, where: str) -> None:
    """Refuse messages among strings, or strings among messages.

    Raises:
        ValueError: The row is not of the kind of the source's first row; names place, column and rule.
    """
    kinds = ["a string" if isinstance(each.prompt, str) else "a list of messages" for each in (row, first)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{where}, column {column!r}: {kinds[0]}, but line {first.example_id + 1} has {kinds[1]}; "
            "all rows must be of one kind"
        )


def split_rows(rows: Sequence[Row], *, eval_fraction: float, seed: int, name: str) -> tuple[list[Row], list[Row], str]:
    """Hold out rows that share no prompt with the others, or no completion if there are too few prompts.

    Returns:
        Rows to train on, rows to evaluate on, and what they do not share: "prompt" or "completion".

    Raises:
        ValueError: A share is asked for but no row can be held out.
    """
    labels = [row.label for row in rows]
    keys = [json.dumps(row.prompt) for row in rows]
    # With fewer prompts than this, holding one out takes more than the share asked for.
    enough = eval_fraction == 0 or len(set(keys)) * min(eval_fraction, 1 - eval_fraction) >= 1
    by_prompt = enough and (eval_fraction == 0 or can_split(keys, labels))
    if not by_prompt:
        keys = [json.dumps(row.completion) for row in rows]
    train, held_out = group_split(keys, labels, eval_fraction=eval_fraction, seed=seed)
    if eval_fraction and not held_out:
        raise ValueError(
            f"{name}: eval_fraction={eval_fraction} holds out none of {len(rows)} rows, since training needs both "
            "classes; add rows, give an eval_path, or set eval_fraction=0"
        )
    return [rows[i] for i in train], [rows[i] for i in held_out], "prompt" if by_prompt else "completion"


def shuffle_row_labels(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same rows with their labels permuted."""
    labels = permute_labels([row.label for row in rows], seed=seed)
    return [replace(row, label=label) for row, label in zip(rows, labels, strict=True)]


def rows_to_dataset(rows: Sequence[Row]) -> Dataset:
    """Rows, all of one kind, as a data set with explicit types."""
    conversational = bool(rows) and not isinstance(rows[0].prompt, str)
    text = List({"role": Value("string"), "content": Value("string")}) if conversational else Value("string")
    features = {"prompt": text, "completion": text, "label": Value("bool"), "example_id": Value("int64")}
    values: dict[str, list[Any]] = {key: [getattr(row, key) for row in rows] for key in features}
    for key in rows[0].numbers if rows else ():
        features[key], values[key] = Value("float64"), [row.numbers[key] for row in rows]
    return Dataset.from_dict(values, features=Features(features))
