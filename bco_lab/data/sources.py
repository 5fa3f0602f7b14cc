"""From a feedback log to rows: what every source does, whatever the shape of its records (see shapes.py for those)."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from tqdm.auto import tqdm

from bco_lab.data.feedback import Feedback, RecordError
from bco_lab.data.labels import check_both_classes, check_scale
from bco_lab.data.rows import (
    LoadReport,
    Row,
    check_feedback,
    check_same_kind,
    count_repeats,
    oversample_rows,
    rows_to_dataset,
    shuffle_row_labels,
    split_rows,
    text_key,
)
from bco_lab.data.splits import stratified_sample
from bco_lab.data.tables import Place, Record, find_files, read_files, read_hub
from bco_lab.data.transcripts import as_chat

BALANCES = ("none", "oversample")
ON_ERROR = ("raise", "skip")
NO_LABEL = "no label"


@dataclass(frozen=True)
class FeedbackData:
    """Rows to train on, rows never trained on, and rows for an independent judge.

    Attributes:
        train: Columns `prompt` and `completion` (strings, or lists of messages), `label` (bool) and `example_id`
            (int64: the 0-based row of the source, unique); where the source has them `source`, `id` and `timestamp`,
            and `origin` (file and line).
        eval: The same columns, or None.
        judge: Columns `text` and `label`; no text is a completion of `train` or `eval`. None if the source has none.
        name: Of the source.
        split_by: What `train` and `eval` do not share: "prompt", "completion", or "file" where each is a file.
        report: What became of the records.
        rejected: Records that were skipped, each with file, row, column, rule and the record itself.
    """

    train: Dataset
    eval: Dataset | None
    judge: Dataset | None = None
    name: str = "feedback"
    split_by: str = "prompt"
    report: LoadReport | None = None
    rejected: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A record that says nothing about a completion, through no fault of its own."""

    reason: str


@dataclass
class _Counts:
    """What has been seen so far, over all files."""

    records: int = 0
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FeedbackSource(ABC):
    """A feedback log. Subclasses say what one record means; everything else is the same for all of them.

    Args:
        path: A file, a glob pattern, or a list of them: JSON lines, a JSON list, CSV, TSV, Parquet, Arrow, or a folder
            that `save_to_disk` wrote. Has precedence over `hub`.
        hub: Name of a data set on the Hugging Face Hub.
        subset: Its configuration; None for the only one.
        split: Its split to train on.
        revision: Its branch, tag or commit.
        eval_path: Files to evaluate on. Without them, part of the rows is held out: whole prompts, or whole completions
            if there are too few prompts to hold some out.
        eval_split: The hub data set's split to evaluate on; unused with `path`.
        eval_fraction: Share of the rows to hold out, in [0, 1); 0 for no evaluation. Unused with a second file or
            split.
        max_rows: Keep a random sample of at most this many rows of each file or split, classes in proportion.
        balance: "oversample" repeats training rows of the smaller class until both have as many; "none".
        chat: Turn strings into chat messages: a transcript turn by turn, any other prompt into one message of the user.
            Then the tokenizer's chat template is used.
        system: The system message that `chat` puts in front, or None.
        shuffle_labels: Deal the labels out anew within training and within evaluation rows, as a control (see
            `permute_labels`).
        on_error: "raise" stops at the first record that breaks a rule; "skip" leaves such records out and counts them.
        seed: Chooses the rows held out, sampled and repeated.

    Raises:
        ValueError: An argument that breaks a rule.
    """

    path: str | Sequence[str] | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    eval_path: str | Sequence[str] | None = None
    eval_split: str | None = None
    eval_fraction: float = 0.1
    max_rows: int | None = None
    balance: str = "none"
    chat: bool = False
    system: str | None = None
    shuffle_labels: bool = False
    on_error: str = "raise"
    seed: int = 0

    rows_per_record: ClassVar[int | None] = 1
    """None: it varies; then rows are numbered on, and `example_id` does not lead back to the record."""

    def __post_init__(self) -> None:
        if self.path is None and self.hub is None:
            raise ValueError("path=null must be a file, a pattern or a list of them, unless hub names a data set")
        for key in ("path", "eval_path"):
            check_path(key, getattr(self, key))
        if not _is_number(self.eval_fraction, int | float) or not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must be in [0, 1)")
        if self.max_rows is not None and not (_is_number(self.max_rows, int) and self.max_rows >= 2):
            raise ValueError(f"max_rows={self.max_rows} must be at least 2, one of each class, or null")
        if not _is_number(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed} must be a whole number >= 0")
        for key in ("chat", "shuffle_labels"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}={getattr(self, key)} must be true or false")
        for key, known in (("balance", BALANCES), ("on_error", ON_ERROR)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)} must be one of {', '.join(known)}")
        if self.system is not None and not self.chat:
            raise ValueError("system needs chat=true: it is the first message of a chat")

    # ---- what a subclass says ----

    @abstractmethod
    def feedback(self, record: Mapping[str, Any]) -> Iterable[Feedback | LeftOut]:
        """What one record says: its thumbs, or why it says nothing.

        Raises:
            RecordError: The record breaks a rule.
        """

    @property
    def names(self) -> Mapping[str, str]:
        """Our name of a column to the record's, for errors."""
        return {}

    @property
    def labels(self) -> Mapping[Any, bool] | None:
        """The log's own words for labels (see `parse_label`)."""
        return None

    # ---- what all of them do ----

    def load(self) -> FeedbackData:
        """Read, check, count, sample, split and balance.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: What is wrong with a record, naming file, row, column and rule; or with the log as a whole.
        """
        counts = _Counts()
        files, records = self._records(self.path, self.split)
        name = self._name(files)
        rows = self._rows(records, counts, name)
        check_both_classes([row.label for row in rows], name)
        everything = rows
        eval_files: tuple[str, ...] = ()
        train = self._sample(rows)
        if self._has_own_eval:
            eval_files, records = self._records(self.eval_path, self.eval_split or "")
            read = self._rows(records, counts, ", ".join(eval_files), like=rows[0])
            _check_disjoint(rows, read)
            everything = [*rows, *read]
            held_out, split_by = self._sample(read), "file"
        else:
            train, held_out, split_by = split_rows(train, eval_fraction=self.eval_fraction, seed=self.seed, name=name)
        sampled = len(train) + len(held_out)
        if self.shuffle_labels:
            train, held_out = shuffle_row_labels(train, self.seed), shuffle_row_labels(held_out, self.seed)
        own = len(train)
        if self.balance == "oversample":
            train = oversample_rows(train, self.seed)
        duplicates, contradictions = count_repeats(everything)
        return FeedbackData(
            train=rows_to_dataset(train),
            eval=rows_to_dataset(held_out) if held_out else None,
            name=self._title(files),
            split_by=split_by,
            rejected=tuple(counts.rejected),
            report=LoadReport(
                files=(*files, *eval_files),
                records=counts.records,
                rejected=len(counts.rejected),
                left_out=dict(counts.left_out),
                rows=len(everything),
                desirable=sum(row.label for row in everything),
                prompts=len({text_key(row.prompt) for row in everything}),
                duplicates=duplicates,
                contradictions=contradictions,
                sampled=sampled if self.max_rows is not None else None,
                oversampled=len(train) - own,
                split_by=split_by,
            ),
        )

    @property
    def _has_own_eval(self) -> bool:
        return self.eval_path is not None or (self.path is None and self.eval_split is not None)

    def _records(
        self, path: str | Sequence[str] | None, split: str
    ) -> tuple[tuple[str, ...], Iterator[tuple[int, Place, Record]]]:
        if path is not None:
            files = find_files(path)
            return tuple(files), read_files(files)
        assert self.hub is not None
        return (f"{self.hub}/{split}",), read_hub(self.hub, subset=self.subset, split=split, revision=self.revision)

    def _name(self, files: Sequence[str]) -> str:
        if self.path is None:
            assert self.hub is not None
            return self.hub
        return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"

    def _title(self, files: Sequence[str]) -> str:
        """A short name: the file's without folder and suffixes."""
        if self.path is None:
            return self._name(files)
        first = Path(files[0]).name.split(".")[0]
        return first if len(files) == 1 else f"{first} and {len(files) - 1} more"

    def _rows(
        self, records: Iterator[tuple[int, Place, Record]], counts: _Counts, name: str, like: Row | None = None
    ) -> list[Row]:
        """Rows of the records, all of the kind of the first one, or of another row."""
        rows: list[Row] = []
        written: list[Any] = []
        for number, place, record in tqdm(records, desc="Reading rows", unit="row", leave=False, delay=2):
            counts.records += 1
            try:
                found, labels = self._rows_of(record, number, str(place), counts)
                for row in found:
                    first = like or (rows[0] if rows else found[0])
                    check_same_kind(row, first, column=self.names.get("prompt", "prompt"))
            except RecordError as error:
                self._reject(error, place, record, counts)
                continue
            rows += found
            written += labels
        if not rows:
            raise ValueError(f"{name}: the file has no rows{_why_none(counts)}")
        if self.labels is None:
            check_scale(written, f"{name}, column {self.names.get('label', 'label')!r}")
        return rows

    def _rows_of(self, record: Record, number: int, origin: str, counts: _Counts) -> tuple[list[Row], list[Any]]:
        """Rows of one record, and their labels as the log has them."""
        if isinstance(record, RecordError):
            raise record
        rows, labels, left_out = [], [], []
        for place, said in enumerate(self.feedback(record)):
            if isinstance(said, LeftOut) or _is_null(said.label):
                left_out.append(said.reason if isinstance(said, LeftOut) else NO_LABEL)
                continue
            chat = as_chat(said, self.system) if self.chat else said
            example_id = counts.rows if self.rows_per_record is None else number * self.rows_per_record + place
            counts.rows += 1
            rows.append(
                check_feedback(chat, example_id=example_id, origin=origin, label_map=self.labels, names=self.names)
            )
            labels.append(said.label)
        counts.left_out.update(left_out)
        return rows, labels

    def _reject(self, error: RecordError, place: Place, record: Record, counts: _Counts) -> None:
        if self.on_error == "raise":
            raise ValueError(f"{place}, {error}" if error.column is not None else f"{place}: {error}") from error
        content = None if isinstance(record, RecordError) else json.loads(json.dumps(record, default=str))
        counts.rejected.append(
            {"file": place.file, place.unit: place.row, "column": error.column, "rule": error.rule, "record": content}
        )

    def _sample(self, rows: list[Row]) -> list[Row]:
        if self.max_rows is None:
            return rows
        return [rows[i] for i in stratified_sample([row.label for row in rows], self.max_rows, seed=self.seed)]


def check_path(key: str, value: Any) -> None:
    """Refuse what is neither None nor the names of files.

    Raises:
        ValueError: Names setting and value.
    """
    each = [value] if isinstance(value, str) or value is None else value
    if not isinstance(each, Sequence) or not each or not all(one is None or isinstance(one, str) for one in each):
        raise ValueError(f"{key}={value} must be the name of a file, a pattern, or a list of them")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_null(label: Any) -> bool:
    """No thumb: null, an empty text, or the NaN that tables write for null."""
    return label is None or (isinstance(label, str) and not label.strip()) or label != label


def _why_none(counts: _Counts) -> str:
    reasons = [f"{number} records: {reason}" for reason, number in counts.left_out.items()]
    if counts.rejected:
        first = counts.rejected[0]
        place = next(f"{unit} {first[unit]}" for unit in ("line", "row") if unit in first)
        column = "" if first["column"] is None else f", column {first['column']!r}"
        reasons.append(f"{len(counts.rejected)} rejected, the first: {first['file']}, {place}{column}: {first['rule']}")
    return f" that can be used ({'; '.join(reasons)})" if reasons else ""


def _check_disjoint(train: list[Row], held_out: list[Row]) -> None:
    """Refuse to evaluate on rows that are trained on."""
    origins = {(text_key(row.prompt), text_key(row.completion)): row.origin for row in train}
    for row in held_out:
        origin = origins.get((text_key(row.prompt), text_key(row.completion)))
        if origin is not None:
            raise ValueError(
                f"{row.origin}: prompt and completion also stand in {origin}; rows to evaluate on must not be "
                "trained on"
            )
