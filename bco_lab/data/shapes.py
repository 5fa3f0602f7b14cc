"""One adapter for each shape of feedback log; all of them end in prompt, completion and label."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bco_lab.data.feedback import Feedback, RecordError
from bco_lab.data.pairs import split_pair
from bco_lab.data.rows import COLUMNS, OPTIONAL_COLUMNS
from bco_lab.data.sources import FeedbackSource, LeftOut

NOTES = ("source", "id", "timestamp")


_PROMPT = "prompt"


@dataclass(frozen=True, kw_only=True)
class Unpaired(FeedbackSource):
    """Single thumbs: a prompt, a completion and a label in each record.

    Args:
        columns: Our name to the log's: prompt, completion, label, and where a log has them example_weight, p_desirable,
            source, id and timestamp. A dot leads into nested records: `label: data.rating`. Names that are left out are
            the log's own.
        label_map: Value to label, for a log with its own words; see `parse_label` for those understood without.
    """

    columns: Mapping[str, str] | None = None
    label_map: Mapping[Any, bool] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns is not None and not isinstance(self.columns, Mapping):
            raise ValueError(f"columns={self.columns} must be a map, such as {{prompt: question}}")
        _check_columns(self.columns or {}, (*COLUMNS, *OPTIONAL_COLUMNS, *NOTES))
        if set(OPTIONAL_COLUMNS) <= set(self.columns or {}):
            raise ValueError(f"columns has {' and '.join(OPTIONAL_COLUMNS)}: a row has one weight, name one of them")
        check_label_map(self.label_map)

    @property
    def names(self) -> Mapping[str, str]:
        """Our name of a column to the log's."""
        return {ours: ours for ours in COLUMNS} | dict(self.columns or {})

    @property
    def labels(self) -> Mapping[Any, bool] | None:
        """The log's own words."""
        return self.label_map

    def feedback(self, record: Mapping[str, Any]) -> Iterable[Feedback]:
        """One thumb."""
        values = look_up(record, self.names)
        numbers = {ours: values[ours] for ours in OPTIONAL_COLUMNS if ours in values}
        prompt, completion, label = (values[ours] for ours in COLUMNS)
        return [Feedback(prompt, completion, label, numbers=numbers, **_notes(values))]


@dataclass(frozen=True, kw_only=True)
class Paired(FeedbackSource):
    """Pairs of a chosen and a rejected completion: a desirable and an undesirable row each (see `unpair`).

    Args:
        prompt: Column of the prompt, if there is one; without it, what both completions start with.
        chosen: Column of the better completion.
        rejected: Column of the worse one.
    """

    prompt: str | None = _PROMPT
    chosen: str = "chosen"
    rejected: str = "rejected"

    rows_per_record: ClassVar[int | None] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self, ("chosen", "rejected"), ("prompt",))

    @property
    def names(self) -> Mapping[str, str]:
        """Our name of a column to the log's."""
        return {"chosen": self.chosen, "rejected": self.rejected} | ({"prompt": self.prompt} if self.prompt else {})

    def feedback(self, record: Mapping[str, Any]) -> Iterable[Feedback]:
        """The desirable row, then the undesirable one."""
        names = dict(self.names)
        if self.prompt == _PROMPT and not _has(record, _PROMPT):
            del names["prompt"]  # nobody asked for it, and a log may well have no such column
        pair = look_up(record, names)
        try:
            prompt, chosen, rejected = split_pair(pair)
        except RecordError as error:
            column = None if error.column is None else names.get(error.column, error.column)
            raise RecordError(column, error.rule) from error
        return [Feedback(prompt, chosen, True), Feedback(prompt, rejected, False)]


@dataclass(frozen=True, kw_only=True)
class Rated(FeedbackSource):
    """Scores: a completion is desirable from a threshold on.

    Args:
        prompt: Column of the prompt.
        completion: Column of the completion.
        score: Column of the score, a number.
        threshold: Scores from here on are desirable, scores below are not.
        drop_from: Scores from here to below the threshold are neither, and left out; None: no such band.
        completions: Column of a list of completions with their scores, such as UltraFeedback's; then `completion` and
            `score` are keys of its elements. None: one completion a record.
        source: Column (or key of the elements) of who wrote the completion; None for none.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    score: str = "score"
    threshold: float
    drop_from: float | None = None
    completions: str | None = None
    source: str | None = None

    rows_per_record: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("threshold", "drop_from"):
            value = getattr(self, key)
            wanted = (int, float) if key == "threshold" else (int, float, type(None))
            if isinstance(value, bool) or not isinstance(value, wanted) or value != value:
                raise ValueError(f"{key}={value} must be a number")
        check_names(self, ("prompt", "completion", "score"), ("completions", "source"))
        if self.drop_from is not None and self.drop_from >= self.threshold:
            raise ValueError(f"drop_from={self.drop_from} must be below threshold={self.threshold}, or null")

    @property
    def names(self) -> Mapping[str, str]:
        """Our name of a column to the log's."""
        inside = "" if self.completions is None else f"{self.completions}."
        return {"prompt": self.prompt, "completion": inside + self.completion, "label": inside + self.score}

    def feedback(self, record: Mapping[str, Any]) -> Iterable[Feedback | LeftOut]:
        """One thumb for each completion."""
        prompt = look_up(record, {"prompt": self.prompt})["prompt"]
        return [self._judge(prompt, each) for each in self._each(record)]

    def _each(self, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        if self.completions is None:
            return [record]
        found = look_up(record, {"completions": self.completions})["completions"]
        if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
            raise RecordError(self.completions, f"must be a list of completions with their scores, not {found!r:.60}")
        return found

    def _judge(self, prompt: Any, record: Mapping[str, Any]) -> Feedback | LeftOut:
        wanted = {"completion": self.completion, "score": self.score} | ({"source": self.source} if self.source else {})
        values = look_up(record, wanted)
        score = self._number(values["score"])
        if score is not None and self.drop_from is not None and self.drop_from <= score < self.threshold:
            return LeftOut(f"score from {self.drop_from:g} to below {self.threshold:g}")
        label = None if score is None else score >= self.threshold
        return Feedback(prompt, values["completion"], label, **_notes(values))

    def _number(self, score: Any) -> float | None:
        if score is None or (isinstance(score, str) and score.strip() in ("", "N/A")):
            return None
        try:
            number = float("x" if isinstance(score, bool) else score)
        except (TypeError, ValueError, OverflowError):
            raise RecordError(self.names["label"], f"score {score!r:.60} must be a number") from None
        return None if number != number else number


def look_up(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Our names to the record's values.

    Args:
        record: Column to value; columns may be nested.
        names: Our name to the record's: a column, or a dotted path into one.

    Raises:
        RecordError: The record lacks one; the message lists those it has.
    """
    missing = [theirs for theirs in names.values() if not _has(record, theirs)]
    if missing:
        found = ", ".join(map(str, record)) or "no columns"
        raise RecordError(None, f"no column {', '.join(map(repr, missing))}; the row has: {found}")
    return {ours: _at(record, theirs) for ours, theirs in names.items()}


_MISSING = object()


def _has(record: Mapping[str, Any], path: str) -> bool:
    return _at(record, path) is not _MISSING


def _at(record: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a dotted path; null anywhere on the path is null."""
    if path in record:
        return record[path]
    first, dot, rest = path.partition(".")
    if not dot or first not in record:
        return _MISSING
    inner = record[first]
    if inner is None:
        return None
    return _at(inner, rest) if isinstance(inner, Mapping) else _MISSING


def _notes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if values[key] is None else str(values[key]) for key in NOTES if key in values}


def _check_columns(columns: Mapping[str, str], known: Iterable[str]) -> None:
    unknown = [key for key in columns if key not in known]
    if unknown:
        raise ValueError(f"columns has {', '.join(map(repr, unknown))}; its keys are {', '.join(known)}")
    for key, value in columns.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"columns.{key}={value} must be the name of a column")


def check_label_map(label_map: Mapping[Any, bool] | None) -> None:
    """Refuse a map with values that are no labels.

    Raises:
        ValueError: Names key and value.
    """
    if label_map is not None and not isinstance(label_map, Mapping):
        raise ValueError(f"label_map={label_map} must be a map, such as {{up: true, down: false}}")
    meant: dict[str, bool] = {}
    for key, value in (label_map or {}).items():
        if not isinstance(value, bool):
            raise ValueError(f"label_map.{key}={value} must be true or false")
        if meant.setdefault(str(key), value) != value:
            raise ValueError(f"label_map has {key} twice, with both labels")


def check_names(source: FeedbackSource, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Refuse settings that must name something and do not.

    Args:
        source: Whose settings.
        required: Those that must be a name.
        optional: Those that may be None instead.

    Raises:
        ValueError: Names setting and value.
    """
    for keys, or_null in ((required, ""), (optional, " or null")):
        for key in keys:
            value = getattr(source, key)
            if not (isinstance(value, str) and value) and not (or_null and value is None):
                raise ValueError(f"{key}={value} must be a name{or_null}")
