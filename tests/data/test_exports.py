"""What records of Open WebUI, Langfuse and LangSmith mean, one shape at a time."""

import json
from typing import Any

import pytest

from bco_lab.data.exports import conversation, langfuse_feedback, langsmith_feedback, open_webui_feedback
from bco_lab.data.feedback import Feedback, RecordError

Messages = list[dict[str, str]]
NAMES = ("inputs", "outputs")


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def answer(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def lang_chain(kind: str, **fields: Any) -> dict[str, Any]:
    """A message as LangChain serialises its constructor."""
    return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", kind], "kwargs": fields}


def open_webui(**changes: Any) -> dict[str, Any]:
    """A thumbs-up for the message `a`, of which `b` is a regenerated sibling."""
    messages = {
        "q": {"id": "q", "parentId": None, "childrenIds": ["a", "b"], "role": "user", "content": "Hi"},
        "a": {"id": "a", "parentId": "q", "childrenIds": [], "role": "assistant", "content": "Hello!", "model": "m"},
        "b": {"id": "b", "parentId": "q", "childrenIds": [], "role": "assistant", "content": "What?", "model": "m"},
    }
    return {
        "id": "f",
        "type": "rating",
        "data": {"rating": 1, "model_id": "m", "sibling_model_ids": ["m"]},
        "meta": {"arena": False, "model_id": "m", "message_id": "a", "message_index": 2, "chat_id": "c"},
        "snapshot": {"chat": {"id": "c", "chat": {"history": {"messages": messages, "currentId": "b"}}}},
        "created_at": 1_760_000_000,
    } | changes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"messages": user("q")}, user("q")),
        ({"messages": [{"type": "human", "data": {"content": "q"}}]}, user("q")),
        ({"messages": [{"type": "human", "content": "q", "id": "1"}]}, user("q")),
        ({"messages": [[lang_chain("HumanMessage", content="q")]]}, user("q")),
        ({"messages": [["user", "q"]]}, user("q")),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, user("q")),
        ([["system", "s"], ["human", "q"]], [{"role": "system", "content": "s"}, *user("q")]),
    ],
)
def test_messages_are_read_in_every_spelling(given: Any, expected: Messages) -> None:
    assert conversation(given, "a", names=NAMES) == (expected, answer("a"))
    assert conversation(json.dumps(given), "a", names=NAMES) == (expected, answer("a"))


@pytest.mark.parametrize("key", ["question", "input", "query", "prompt"])
def test_a_text_is_found_under_its_usual_names(key: str) -> None:
    assert conversation({key: "q", "top_k": 3}, "a", names=NAMES) == ("q", "a")


@pytest.mark.parametrize(
    "returned",
    [
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}}]},
        {"generations": [[{"text": "a", "message": lang_chain("AIMessage", content="a")}]]},
        {"message": {"role": "assistant", "content": "a"}},
        {"output": lang_chain("AIMessage", content="a")},
        {"role": "assistant", "content": "a"},
        {"messages": [*user("q"), {"type": "ai", "content": "a"}]},
        {"messages": [*user("earlier"), *answer("reply"), *user("q"), *answer("a")]},
    ],
)
def test_an_answer_is_found_in_every_place(returned: Any) -> None:
    asked, answered = conversation("q", returned, names=NAMES)
    assert answered == answer("a")
    assert asked[-1:] == user("q")


@pytest.mark.parametrize("key", ["output", "answer", "text"])
def test_an_answer_in_text_stays_text(key: str) -> None:
    assert conversation("q", {key: "a"}, names=NAMES) == ("q", "a")


def test_generations_of_text_alone_stay_text() -> None:
    assert conversation("q", {"generations": [[{"text": "a"}]]}, names=NAMES) == ("q", "a")


def test_an_output_that_holds_the_whole_thread_gives_the_earlier_turns_too() -> None:
    thread = [*user("one"), *answer("1"), *user("two"), *answer("2")]
    assert conversation({"messages": user("two")}, {"messages": thread}, names=NAMES) == (thread[:3], answer("2"))


def test_an_answer_that_is_json_stays_the_text_it_is() -> None:
    assert conversation("q", {"output": '{"city": "Paris"}'}, names=NAMES) == ("q", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("given", "returned", "column", "rule"),
    [
        (
            {"messages": [*user("q"), {"role": "tool", "content": "4", "tool_call_id": "1"}]},
            "a",
            "inputs[1]",
            "a message of the role 'tool' is not supported, only text of user and assistant",
        ),
        (
            "q",
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            "outputs[0]",
            "the message has no text: it calls a tool, which is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "a",
            "inputs[0]",
            "a part of the type 'image_url' is not supported, only text",
        ),
        ({"messages": user("q")}, {"messages": user("q")}, "outputs", "repeats the input and adds no answer"),
        (
            "q",
            None,
            "outputs",
            "is null: no completion can be read from it; say where it is with dataset.completion=PATH",
        ),
    ],
)
def test_what_cannot_be_read_is_named(given: Any, returned: Any, column: str, rule: str) -> None:
    with pytest.raises(RecordError) as caught:
        conversation(given, returned, names=NAMES)
    assert (caught.value.column, caught.value.rule) == (column, rule)
    assert str(caught.value) == f"column {column!r}: {rule}"


@pytest.mark.parametrize(
    ("score", "label"),
    [
        ({"dataType": "NUMERIC", "value": -1}, -1),
        ({"dataType": "BOOLEAN", "value": 0, "stringValue": "False"}, 0),
        ({"dataType": "CATEGORICAL", "value": 0, "stringValue": "thumbs_up"}, "thumbs_up"),
        ({"data_type": "CATEGORICAL", "value": "1", "string_value": "bad"}, "bad"),
        ({"data_type": "TEXT", "value": 0, "string_value": "good"}, "good"),
        ({"dataType": "NUMERIC", "value": None, "stringValue": None}, None),
    ],
)
def test_langfuse_labels(score: dict[str, Any], label: Any) -> None:
    assert langfuse_feedback(score, {"input": "q", "output": "a"}).label == label


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2026-10-01 11:00:00.500000", "2026-10-01T11:00:00.500000+00:00"),
        ("2026-10-01T11:00:00.500Z", "2026-10-01T11:00:00.500Z"),
        ("2026-10-01T13:00:00+02:00", "2026-10-01T11:00:00+00:00"),
    ],
)
def test_timestamps_are_of_one_zone(written: str, moment: str) -> None:
    score = {"id": "s", "value": 1, "timestamp": written}
    assert langfuse_feedback(score, {"input": "q", "output": "a"}).timestamp == moment


@pytest.mark.parametrize(
    ("feedback", "label"),
    [({"score": 0, "value": "x"}, 0), ({"score": True}, True), ({"score": None, "value": "up"}, "up"), ({}, None)],
)
def test_langsmith_labels(feedback: dict[str, Any], label: Any) -> None:
    assert langsmith_feedback(feedback, {"inputs": {"input": "q"}, "outputs": {"output": "a"}}).label is label


def test_open_webui_leaves_siblings_out_and_reads_json_in_text() -> None:
    expected = Feedback(user("Hi"), answer("Hello!"), 1, source="m", id="f", timestamp="2025-10-09T08:53:20+00:00")
    record = open_webui()
    assert open_webui_feedback(record) == expected
    texts = {key: json.dumps(record[key]) for key in ("data", "meta", "snapshot")}
    assert open_webui_feedback(record | texts) == expected


@pytest.mark.parametrize(
    "changes", [{"data": {"rating": 0}}, {"data": {"rating": None}}, {"data": None}, {"type": "rank"}]
)
def test_open_webui_records_that_are_no_thumb_have_no_label(changes: dict[str, Any]) -> None:
    assert open_webui_feedback(open_webui(**changes)).label is None


def test_open_webui_refuses_images_and_damaged_histories() -> None:
    record = open_webui()
    history = record["snapshot"]["chat"]["chat"]["history"]
    history["messages"]["q"]["files"] = [{"type": "image", "url": "u"}]
    with pytest.raises(RecordError) as caught:
        open_webui_feedback(record)
    assert caught.value.column == "snapshot.chat.chat.history.messages.q"
    assert caught.value.rule == "the message has an image, only text is supported"
    record["snapshot"]["chat"]["chat"]["history"] = "lost"
    with pytest.raises(RecordError) as caught:
        open_webui_feedback(record)
    assert caught.value.column == "snapshot.chat.chat.history.messages"
    assert caught.value.rule == "must hold the messages of the chat"
