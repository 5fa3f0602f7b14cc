"""The steps that all sources share: check rows, count what they hold, split them, make a data set of them."""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from datasets import Dataset, Features, List, Value

from bco_lab.data.chat import check_pair, check_text
from bco_lab.data.feedback import Feedback, RecordError
from bco_lab.data.labels import parse_label
from bco_lab.data.splits import can_split, group_split, oversample, permute_labels

COLUMNS = ("prompt", "completion", "label")
OPTIONAL_COLUMNS = ("example_weight", "p_desirable")  # numbers that a log may bring: see bco_lab.data.weights
LARGEST_WEIGHT = 1e6  # beyond it one row is all there is, and float32 is not far
_NOTES = ("source", "id", "timestamp", "origin")  # texts, kept where a row has them

Text = str | list[dict[str, str]]


class NothingToHoldOutError(ValueError):
    """No part of the rows can be held out that leaves both classes to train on."""


@dataclass(frozen=True)
class Row:
    """One checked row of feedback.

    Attributes:
        prompt: A string or messages.
        completion: The same kind.
        label: True is desirable.
        example_id: 0-based place in the source, unique.
        numbers: Of OPTIONAL_COLUMNS, those that the source maps.
        source: Who wrote the completion.
        id: The log's own name of the feedback.
        timestamp: When it was given.
        origin: File and line, for errors.
    """

    prompt: Text
    completion: Text
    label: bool
    example_id: int
    numbers: dict[str, float] = field(default_factory=dict)
    source: str | None = None
    id: str | None = None
    timestamp: str | None = None
    origin: str | None = None


@dataclass(frozen=True)
class LoadReport:
    """What became of the records of a source.

    Attributes:
        files: What was read.
        records: Records read.
        rejected: Records that break a rule and were skipped (`on_error=skip`).
        left_out: Reason to number of records that carry no thumb.
        rows: Rows that came out, both splits, before sampling.
        desirable: Desirable ones among them.
        prompts: Different prompts among them.
        duplicates: Rows that repeat prompt, completion and label of an earlier row.
        contradictions: Pairs of prompt and completion that have both labels.
        sampled: Rows that `max_rows` kept; None without it.
        oversampled: Copies that `balance=oversample` added to the training rows.
        split_by: What training and evaluation rows do not share: "prompt", "completion", or "file".
    """

    files: tuple[str, ...]
    records: int
    rejected: int
    left_out: dict[str, int]
    rows: int
    desirable: int
    prompts: int
    duplicates: int
    contradictions: int
    sampled: int | None
    oversampled: int
    split_by: str

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, for JSON."""
        return asdict(self) | {"files": list(self.files)}

    def notes(self) -> list[str]:
        """What a user should know of, a sentence each; nothing where every record became a row of its own."""
        found = [f"{number} records left out: {reason}" for reason, number in sorted(self.left_out.items())]
        if self.rejected:
            found.append(f"{self.rejected} records break a rule and were skipped")
        if self.duplicates:
            found.append(f"{self.duplicates} rows repeat prompt, completion and label of another")
        if self.contradictions:
            found.append(f"{self.contradictions} completions have both labels for the same prompt")
        if self.sampled is not None and self.sampled < self.rows:
            found.append(f"{self.sampled} of {self.rows} rows sampled")
        if self.oversampled:
            found.append(f"{self.oversampled} copies of rows of the smaller class added")
        return found


def check_feedback(
    feedback: Feedback, *, example_id: int, origin: str, label_map: Mapping[Any, bool] | None, names: Mapping[str, str]
) -> Row:
    """Check what a record says and read its label.

    Args:
        feedback: Of the record.
        example_id: The row's own number.
        origin: File and line.
        label_map: See `parse_label`.
        names: Our name of a column to the record's, for errors.

    Raises:
        RecordError: Names column and rule.
    """
    for ours, value in (("prompt", feedback.prompt), ("completion", feedback.completion)):
        try:
            check_text(value, ours)
        except ValueError as error:
            raise RecordError(names.get(ours, ours), str(error)) from error
    try:
        check_pair(feedback.prompt, feedback.completion)
    except ValueError as error:
        raise RecordError(None, str(error)) from error
    try:
        label = parse_label(feedback.label, label_map=label_map)
    except ValueError as error:
        raise RecordError(names.get("label", "label"), str(error)) from error
    numbers = {ours: _check_number(value, ours, names.get(ours, ours)) for ours, value in feedback.numbers.items()}
    return Row(
        prompt=_only_role_and_content(feedback.prompt),
        completion=_only_role_and_content(feedback.completion),
        label=label,
        example_id=example_id,
        numbers=numbers,
        source=feedback.source,
        id=feedback.id,
        timestamp=feedback.timestamp,
        origin=origin,
    )


def check_same_kind(row: Row, first: Row, *, column: str) -> None:
    """Refuse messages among strings, or strings among messages.

    Raises:
        RecordError: The row is not of the kind of the source's first row; names column and rule.
    """
    kinds = ["a string" if isinstance(each.prompt, str) else "a list of messages" for each in (row, first)]
    if kinds[0] != kinds[1]:
        raise RecordError(column, f"{kinds[0]}, but {first.origin} has {kinds[1]}; all rows must be of one kind")


def count_repeats(rows: Sequence[Row]) -> tuple[int, int]:
    """Rows that repeat an earlier one, label included; and pairs of prompt and completion that have both labels."""
    labels: dict[Hashable, set[bool]] = {}
    duplicates = 0
    for row in rows:
        seen = labels.setdefault((text_key(row.prompt), text_key(row.completion)), set())
        duplicates += row.label in seen
        seen.add(row.label)
    return duplicates, sum(1 for seen in labels.values() if len(seen) == 2)


def text_key(text: Text) -> Hashable:
    """Equal for equal prompts or completions."""
    return text if isinstance(text, str) else json.dumps(text)


def split_rows(rows: Sequence[Row], *, eval_fraction: float, seed: int, name: str) -> tuple[list[Row], list[Row], str]:
    """Hold out rows that share no prompt with the others, or no completion if there are too few prompts.

    Returns:
        Rows to train on, rows to evaluate on, and what they do not share: "prompt" or "completion".

    Raises:
        NothingToHoldOutError: A share is asked for but no row can be held out.
    """
    labels = [row.label for row in rows]
    keys = [text_key(row.prompt) for row in rows]
    # With fewer prompts than this, holding one out takes more than the share asked for.
    enough = eval_fraction == 0 or len(set(keys)) * min(eval_fraction, 1 - eval_fraction) >= 1
    by_prompt = enough and (eval_fraction == 0 or can_split(keys, labels))
    if not by_prompt:
        keys = [text_key(row.completion) for row in rows]
    train, held_out = group_split(keys, labels, eval_fraction=eval_fraction, seed=seed)
    if eval_fraction and not held_out:
        raise NothingToHoldOutError(
            f"{name}: eval_fraction={eval_fraction} holds out none of {len(rows)} rows, since training needs both "
            "classes; add rows, give an eval_path, or set eval_fraction=0"
        )
    return [rows[i] for i in train], [rows[i] for i in held_out], "prompt" if by_prompt else "completion"


def shuffle_row_labels(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same rows with their labels permuted."""
    labels = permute_labels([row.label for row in rows], seed=seed)
    return [replace(row, label=label) for row, label in zip(rows, labels, strict=True)]


def oversample_rows(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows and, after them, copies of rows of the smaller class, so that both classes have as many.

    Copy k of the row n is called n + k · (1 + the largest `example_id`).
    """
    step = 1 + max(row.example_id for row in rows)
    copies = oversample([row.label for row in rows], seed=seed)
    return [*rows, *(replace(rows[i], example_id=rows[i].example_id + number * step) for i, number in copies)]


def rows_to_dataset(rows: Sequence[Row]) -> Dataset:
    """Rows, all of one kind, as a data set with explicit types."""
    conversational = bool(rows) and not isinstance(rows[0].prompt, str)
    text = List({"role": Value("string"), "content": Value("string")}) if conversational else Value("string")
    features = {"prompt": text, "completion": text, "label": Value("bool"), "example_id": Value("int64")}
    features |= {key: Value("string") for key in _NOTES if any(getattr(row, key) is not None for row in rows)}
    values: dict[str, list[Any]] = {key: [getattr(row, key) for row in rows] for key in features}
    for key in rows[0].numbers if rows else ():
        features[key], values[key] = Value("float64"), [row.numbers[key] for row in rows]
    return Dataset.from_dict(values, features=Features(features))


def _only_role_and_content(text: Any) -> Text:
    if isinstance(text, str):
        return text
    return [{"role": message["role"], "content": message["content"]} for message in text]


def _check_number(value: Any, ours: str, column: str) -> float:
    largest = 1.0 if ours == "p_desirable" else LARGEST_WEIGHT
    try:
        # CSV has nothing but text
        number = float(value) if isinstance(value, str | int) and not isinstance(value, bool) else value
    except (ValueError, OverflowError):
        number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= largest:
        raise RecordError(column, f"{ours}={value!r} must be a number in [0, {largest:g}]")
    return float(number)
