"""Exports of Open WebUI, Langfuse and LangSmith as feedback logs; what their records mean stands in exports.py."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bco_lab.data.exports import (
    langfuse_feedback,
    langfuse_observation_id,
    langfuse_parent_id,
    langfuse_trace_id,
    langsmith_feedback,
    langsmith_run_id,
    open_webui_feedback,
)
from bco_lab.data.feedback import Feedback, RecordError
from bco_lab.data.shapes import check_label_map, check_names, look_up
from bco_lab.data.sources import FeedbackSource, LeftOut, check_path
from bco_lab.data.tables import find_files, read_files

Files = str | Sequence[str]

# What Python says where an export is not shaped as its tool shapes it: a text in place of an object and the like.
_MISSHAPEN = (TypeError, AttributeError, KeyError, IndexError, RecursionError)


@contextmanager
def _shaped(tool: str) -> Iterator[None]:
    try:
        yield
    except _MISSHAPEN as error:
        raise RecordError(None, f"the record is not shaped as {tool} exports it ({error})") from error


@dataclass(frozen=True, kw_only=True)
class OpenWebUI(FeedbackSource):
    """Open WebUI's feedback export: Admin, Evaluations, Feedbacks, Export, as JSON."""

    @property
    def names(self) -> Mapping[str, str]:
        """Our name of a column to the export's."""
        return {"label": "data.rating"}

    def feedback(self, record: Mapping[str, Any]) -> Iterable[Feedback]:
        """One thumb."""
        with _shaped("Open WebUI"):
            return [open_webui_feedback(record)]


@dataclass(frozen=True, kw_only=True)
class Langfuse(FeedbackSource):
    """Langfuse scores (`path`) joined to what they score.

    Args:
        traces: Exported traces, for scores of whole traces. None: there are none.
        observations: Exported observations, for scores of single observations; a score whose observation is not in them
            belongs to its trace. The observation without a parent stands for a trace that is not in `traces`, as in
            exports of enriched observations. None: there are none.
        score_name: Name of the scores that are thumbs, such as user-feedback; others are left out.
        prompt: Dotted path to the prompt inside `input`; None: find it.
        completion: Dotted path to the completion inside `output`; None: find it.
        label_map: Value to label (see `parse_label`).
    """

    traces: Files | None = None
    observations: Files | None = None
    score_name: str
    prompt: str | None = None
    completion: str | None = None
    label_map: Mapping[Any, bool] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_label_map(self.label_map)
        check_names(self, ("score_name",), ("prompt", "completion"))
        for key in ("traces", "observations"):
            check_path(key, getattr(self, key))
        if self.traces is None and self.observations is None:
            raise ValueError("traces=null must be the file of the traces, unless observations names theirs")

    @property
    def names(self) -> Mapping[str, str]:
        """Our name of a column to the export's."""
        return {"label": "value", "prompt": "input", "completion": "output"}

    @property
    def labels(self) -> Mapping[Any, bool] | None:
        """The log's own words."""
        return self.label_map

    @cached_property
    def _scored(self) -> dict[str, Mapping[str, Any]]:
        observations = _by_id(self.observations)
        # An export without traces has their input and output at the observation that has no parent.
        roots = {langfuse_trace_id(each): each for each in observations.values() if not langfuse_parent_id(each)}
        return {**{key: each for key, each in roots.items() if key}, **_by_id(self.traces), **observations}

    def feedback(self, record: Mapping[str, Any]) -> Iterable[Feedback | LeftOut]:
        """One thumb, or none for a score of another name."""
        name = look_up(record, {"name": "name"})["name"]
        if name != self.score_name:
            return [LeftOut(f"score named {name}")]
        trace, observation = langfuse_trace_id(record), langfuse_observation_id(record)
        scored = next((self._scored[key] for key in (observation, trace) if key in self._scored), None)
        if scored is None:
            asked = f"observation {observation} or trace {trace}" if observation else f"trace {trace}"
            raise RecordError("traceId", f"{asked} is not among the traces and observations given")
        with _shaped("Langfuse"):
            return [langfuse_feedback(record, scored, prompt=self.prompt, completion=self.completion)]


@dataclass(frozen=True, kw_only=True)
class LangSmith(FeedbackSource):
    """LangSmith feedback (`path`) joined to runs.

    Args:
        runs: Exported runs.
        key: The feedback key that is a thumb, such as user_score; others are left out.
        prompt: Dotted path to the prompt inside `inputs`; None: find it.
        completion: Dotted path to the completion inside `outputs`; None: find it.
        label_map: Value to label (see `parse_label`).
    """

    runs: Files
    key: str
    prompt: str | None = None
    completion: str | None = None
    label_map: Mapping[Any, bool] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_label_map(self.label_map)
        check_names(self, ("key",), ("prompt", "completion"))
        check_path("runs", self.runs)

    @property
    def names(self) -> Mapping[str, str]:
        """Our name of a column to the export's."""
        return {"label": "score", "prompt": "inputs", "completion": "outputs"}

    @property
    def labels(self) -> Mapping[Any, bool] | None:
        """The log's own words."""
        return self.label_map

    @cached_property
    def _runs(self) -> dict[str, Mapping[str, Any]]:
        return _by_id(self.runs)

    def feedback(self, record: Mapping[str, Any]) -> Iterable[Feedback | LeftOut]:
        """One thumb, or none for a feedback of another key."""
        key = look_up(record, {"key": "key"})["key"]
        if key != self.key:
            return [LeftOut(f"feedback of the key {key}")]
        run = langsmith_run_id(record)
        if run not in self._runs:
            raise RecordError("run_id", f"run {run} is not among the runs given")
        with _shaped("LangSmith"):
            return [langsmith_feedback(record, self._runs[run], prompt=self.prompt, completion=self.completion)]


def _by_id(files: Files | None) -> dict[str, Mapping[str, Any]]:
    """Records by their `id`.

    Raises:
        ValueError: A record without one, or a line that is no record.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for _number, place, record in read_files(find_files(files)) if files is not None else ():
        if isinstance(record, RecordError):
            raise ValueError(f"{place}: {record}")
        if not record.get("id"):
            raise ValueError(f"{place}: no column 'id'; the row has: {', '.join(map(str, record))}")
        if found.setdefault(str(record["id"]), record) != record:
            raise ValueError(f"{place}: the id {record['id']!r} is there twice, with other content")
    return found
