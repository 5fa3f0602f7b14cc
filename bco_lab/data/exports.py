"""What records mean that Open WebUI, Langfuse and LangSmith export: pure functions from a record to a thumb.

Field names follow Open WebUI's `models/feedbacks.py` (0.6), Langfuse's public API and blob-storage export (v3), and
LangSmith's feedback and run data formats (2026).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from bco_lab.data.chat import common_prefix
from bco_lab.data.feedback import Feedback, RecordError

Conversation = str | list[dict[str, str]]

_ROLES = {
    **dict.fromkeys(("user", "human", "HumanMessage", "HumanMessageChunk"), "user"),
    **dict.fromkeys(("assistant", "ai", "model", "AIMessage", "AIMessageChunk"), "assistant"),
    **dict.fromkeys(("system", "SystemMessage"), "system"),
    "developer": "developer",
}
# Where applications put the one text that matters, most telling first.
_PROMPT_KEYS = (
    "messages",
    "input",
    "question",
    "query",
    "prompt",
    "user_input",
    "message",
    "text",
    "content",
    "inputs",
)
_COMPLETION_KEYS = ("messages", "output", "answer", "response", "completion", "result", "message", "text", "outputs")
_HISTORY_KEYS = ("chat_history", "history")
_WORDED = ("CATEGORICAL", "TEXT", "CORRECTION")  # Langfuse's types of scores whose value is no number of its own
_TEXT_PARTS = ("text", "input_text", "output_text")


# ---- Open WebUI ----


def open_webui_feedback(record: Mapping[str, Any]) -> Feedback:
    """A feedback of Open WebUI's export (Admin, Evaluations, Feedbacks): the rated message and the chat above it.

    The completion is the message `meta.message_id`, the prompt is the chain of its parents: what was regenerated beside
    it is not in it. A system prompt of the chat stands in front. The label is `data.rating`, 1 or -1; 0 is none.

    Args:
        record: One element of the exported list.

    Raises:
        RecordError: The record has no snapshot, or one without the rated message.
    """
    if "data" not in record:
        raise RecordError(None, f"no column 'data'; the row has: {', '.join(map(str, record)) or 'no columns'}")
    data = {} if record["data"] is None else _mapping(record, "data")
    rating = data.get("rating")
    noted: dict[str, Any] = {"source": _text_or_none(data.get("model_id")), "id": _text_or_none(record.get("id"))}
    noted["timestamp"] = _moment(record.get("created_at"))
    if rating in (None, "", 0, "0") or record.get("type") not in ("rating", None):
        return Feedback(None, None, None, **noted)
    meta, chat = _mapping(record, "meta"), _chat_of(record)
    history, params = _parsed(chat.get("history")), _parsed(chat.get("params"))
    messages = history.get("messages") if isinstance(history, Mapping) else None
    if not isinstance(messages, Mapping) or not messages:
        raise RecordError("snapshot.chat.chat.history.messages", "must hold the messages of the chat")
    place = str(meta.get("message_id"))
    if place not in messages:
        raise RecordError("meta.message_id", f"the message {place!r} is not in the snapshot of the chat")
    chain = _ancestors(messages, place)
    system = chat.get("system") or (params.get("system") if isinstance(params, Mapping) else None)
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return Feedback(before + chain[:-1], chain[-1:], rating, **noted)


def _chat_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    chat = _parsed(record.get("snapshot"))
    for _ in range(2):  # the snapshot holds the chat's record, which holds the chat
        chat = _parsed(chat.get("chat")) if isinstance(chat, Mapping) else None
    if not isinstance(chat, Mapping):
        raise RecordError(
            "snapshot.chat.chat", "there is no snapshot of the chat: export with Admin, Evaluations, Feedbacks"
        )
    return chat


def _ancestors(messages: Mapping[str, Any], place: str) -> list[dict[str, str]]:
    """A message and those it answers, first to last."""
    chain: list[dict[str, str]] = []
    seen = set()
    at: str | None = place
    while at is not None:
        where = f"snapshot.chat.chat.history.messages.{at}"
        if at in seen or not isinstance(messages.get(at), Mapping):
            raise RecordError(where, "a message is missing, or is its own ancestor")
        seen.add(at)
        _check_no_images(messages[at], where)
        chain.append(_message(messages[at], where))
        at = messages[at].get("parentId")
    return chain[::-1]


def _check_no_images(message: Mapping[str, Any], where: str) -> None:
    files = message.get("files")
    if any(isinstance(file, Mapping) and file.get("type") == "image" for file in files or ()):
        raise RecordError(where, "the message has an image, only text is supported")


# ---- Langfuse ----


def langfuse_trace_id(score: Mapping[str, Any]) -> str | None:
    """The trace that a score belongs to."""
    return _text_or_none(_either(score, "traceId", "trace_id"))


def langfuse_observation_id(score: Mapping[str, Any]) -> str | None:
    """The observation that a score belongs to; None for a score of the whole trace."""
    return _text_or_none(_either(score, "observationId", "observation_id"))


def langfuse_parent_id(observation: Mapping[str, Any]) -> str | None:
    """The observation that another is part of; None for the one that stands for the whole trace."""
    return _text_or_none(_either(observation, "parentObservationId", "parent_observation_id"))


def langfuse_feedback(
    score: Mapping[str, Any], scored: Mapping[str, Any], *, prompt: str | None = None, completion: str | None = None
) -> Feedback:
    """A Langfuse score and the trace or observation it belongs to.

    The label is `value` (numeric and boolean scores) or `stringValue` (categorical ones, and texts, whose `value` is
    always 0). Names may be those of the API and the UI's export (`traceId`) or of the blob-storage export (`trace_id`).

    Args:
        score: A score.
        scored: The trace or observation, with `input` and `output`.
        prompt: Dotted path to the prompt inside `input`; None: find it (see `conversation`).
        completion: Dotted path to the completion inside `output`; None: find it.

    Raises:
        RecordError: Input or output hold no prompt or completion that can be read.
    """
    kind = _either(score, "dataType", "data_type")
    value, text = score.get("value"), _either(score, "stringValue", "string_value")
    label = text if kind in _WORDED or value is None else value
    if label is None:
        return Feedback(None, None, None)
    asked, answered = conversation(
        scored.get("input"), scored.get("output"), names=("input", "output"), prompt=prompt, completion=completion
    )
    source = _either(scored, "model", "providedModelName", "provided_model_name", "name")
    return Feedback(
        asked,
        answered,
        label,
        source=_text_or_none(source),
        id=_text_or_none(score.get("id")),
        timestamp=_moment(_either(score, "timestamp", "createdAt", "created_at")),
    )


# ---- LangSmith ----


def langsmith_run_id(feedback: Mapping[str, Any]) -> str | None:
    """The run that a feedback belongs to; a feedback on a whole trace belongs to its root run."""
    return _text_or_none(_either(feedback, "run_id", "trace_id"))


def langsmith_feedback(
    feedback: Mapping[str, Any], run: Mapping[str, Any], *, prompt: str | None = None, completion: str | None = None
) -> Feedback:
    """A LangSmith feedback and the run it belongs to.

    The label is `score`, or `value` where there is no score.

    Args:
        feedback: A feedback.
        run: With `inputs` and `outputs`.
        prompt: Dotted path to the prompt inside `inputs`; None: find it (see `conversation`).
        completion: Dotted path to the completion inside `outputs`; None: find it.

    Raises:
        RecordError: Inputs or outputs hold no prompt or completion that can be read.
    """
    label = feedback.get("value") if feedback.get("score") is None else feedback["score"]
    if label is None:
        return Feedback(None, None, None)
    asked, answered = conversation(
        run.get("inputs"), run.get("outputs"), names=("inputs", "outputs"), prompt=prompt, completion=completion
    )
    extra = _parsed(run.get("extra"))
    metadata = extra.get("metadata") if isinstance(extra, Mapping) else None
    model = metadata.get("ls_model_name") if isinstance(metadata, Mapping) else None
    return Feedback(
        asked,
        answered,
        label,
        source=_text_or_none(model or run.get("name")),
        id=_text_or_none(feedback.get("id")),
        timestamp=_moment(feedback.get("created_at")),
    )


# ---- what applications log as input and output ----


def conversation(
    given: Any, returned: Any, *, names: tuple[str, str], prompt: str | None = None, completion: str | None = None
) -> tuple[Conversation, Conversation]:
    """Prompt and completion out of what an application logged as its input and its output.

    Understood are texts; messages as OpenAI and LangChain write them; and mappings that hold either under a usual name
    (`messages`, `input`, `question`, ...; `output`, `answer`, `choices`, `generations`, ...), also as JSON in a text.
    Messages that an output repeats from its input are left out. If one side is messages, so is the other.

    Args:
        given: The input.
        returned: The output.
        names: What errors call them.
        prompt: Dotted path to the prompt inside the input; None: find it.
        completion: Dotted path to the completion inside the output; None: find it.

    Raises:
        RecordError: Names what cannot be read and the way out.
    """
    asked = _with_history(_inside(given, prompt, names[0]), names[0])
    answered = _read(_completion_value(_inside(returned, completion, names[1])), _COMPLETION_KEYS, names[1])
    if isinstance(answered, list):
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        # The output may hold the whole thread where the input was only its newest message.
        thread = answered[0]["role"] != "assistant"
        ends = [place + 1 for place, message in enumerate(answered) if message == asked[-1]] if thread else []
        if common_prefix(asked, answered) == len(asked):
            answered = answered[len(asked) :]
        elif ends:
            asked, answered = answered[: ends[-1]], answered[ends[-1] :]
        if not answered:
            raise RecordError(names[1], "repeats the input and adds no answer")
    elif isinstance(asked, list):
        answered = [{"role": "assistant", "content": answered}]
    return asked, answered


def _with_history(value: Any, name: str) -> Conversation:
    """The prompt of an input; earlier turns that are kept beside the question stand in front of it."""
    asked = _read(value, _PROMPT_KEYS, name)
    history = (
        next((value[key] for key in _HISTORY_KEYS if value.get(key)), None) if isinstance(value, Mapping) else None
    )
    if history is None or not isinstance(asked, str):
        return asked
    turns = _read(_parsed(history), (), name)
    if isinstance(turns, str):
        raise RecordError(name, "the earlier turns are a text, not messages: which of them is whose cannot be told")
    return [*turns, {"role": "user", "content": asked}]


def _inside(value: Any, path: str | None, name: str) -> Any:
    value = _parsed(value)
    for key in path.split(".") if path is not None else ():
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            raise RecordError(name, f"has no {path!r}") from None
    return value


def _completion_value(value: Any) -> Any:
    """The answer itself out of a chat completion (`choices`) or LangChain's result (`generations`)."""
    if isinstance(value, Mapping) and value.get("choices"):
        first = value["choices"][0] if isinstance(value["choices"], list) else None
        value = (first.get("message") or first.get("text")) if isinstance(first, Mapping) else first
    elif isinstance(value, Mapping) and value.get("generations"):
        first = value["generations"][0]
        while isinstance(first, list) and first:
            first = first[0]
        value = (first.get("message") or first.get("text")) if isinstance(first, Mapping) else first
    return [value] if _is_message(value) else value


def _read(value: Any, keys: Sequence[str], name: str) -> Conversation:
    """A text or messages, also inside mappings."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) and not _is_pair(value[0]):
        value = value[0]  # a batch of one
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return [_message(each, f"{name}[{place}]") for place, each in enumerate(value)]
    if isinstance(value, list) and len(value) == 1:
        return _read(value[0], keys, name)
    if isinstance(value, Mapping):
        if _is_message(value):
            return [_message(value, name)]
        called = [each for key in ("args", "kwargs") for each in [value.get(key)] if each]  # a traced Python function
        inner = [value[key] for key in keys if value.get(key)] or called or [each for each in value.values() if each]
        if inner and (len(value) == 1 or any(value.get(key) for key in keys) or called):
            return _read(inner[0], keys, name)
    found = f"has {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"is {_shown(value)}"
    side = "completion" if keys is _COMPLETION_KEYS else "prompt"
    raise RecordError(name, f"{found}: no {side} can be read from it; say where it is with dataset.{side}=PATH")


def _is_message(value: Any) -> bool:
    if _is_pair(value):
        return True
    if not isinstance(value, Mapping):
        return False
    if "lc" in value or ("type" in value and "data" in value):
        return True
    return "content" in value and ("role" in value or str(value.get("type")) in (*_ROLES, "tool"))


def _is_pair(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(isinstance(each, str) for each in value) and value[0] in _ROLES


def _message(value: Any, where: str) -> dict[str, str]:
    """Role and text of a message in any of its spellings."""
    if _is_pair(value):
        return {"role": _ROLES[value[0]], "content": value[1]}
    if "lc" in value:  # LangChain's serialised constructor
        role, fields = (value.get("id") or [None])[-1], value.get("kwargs") or {}
    elif "data" in value and "type" in value:
        role, fields = value["type"], value["data"]
    else:
        role, fields = value.get("role") or value.get("type"), value
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordError(where, f"a message of the role {role!r} is not supported, only text of user and assistant")
    content = fields.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, where)
    if not isinstance(content, str) or not content:
        calls = fields.get("tool_calls") or (fields.get("additional_kwargs") or {}).get("tool_calls")
        why = "it calls a tool, which is not supported" if calls else f"its content is {_shown(content)}"
        raise RecordError(where, f"the message has no text: {why}")
    return {"role": _ROLES[role], "content": content}


def _joined_parts(parts: Sequence[Any], where: str) -> str:
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RecordError(where, f"a part of the type {kind!r} is not supported, only text")
    return "".join(texts)


# ---- values ----


def _parsed(value: Any) -> Any:
    """The value of a cell that holds JSON of a mapping or a list; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[", '"')):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, dict | list | str) else value


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = _parsed(record.get(key))
    if not isinstance(value, Mapping):
        raise RecordError(key, f"must be an object, not {_shown(value)}")
    return value


def _either(record: Mapping[str, Any], *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _text_or_none(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _moment(value: Any) -> str | None:
    """A moment as ISO 8601 in UTC: from seconds or nanoseconds since 1970, or from a text (as it is if no date)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value / 1e9 if value > 1e14 else value / 1e3 if value > 1e11 else value
        try:
            return datetime.fromtimestamp(seconds, UTC).isoformat()
        except (ValueError, OverflowError, OSError):  # no moment that a calendar knows
            return str(value)
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return _text_or_none(value)
    if isinstance(value, str) and moment.utcoffset() == timedelta(0):
        return value
    # All three tools write UTC where they write no zone.
    return (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)).isoformat()


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]
