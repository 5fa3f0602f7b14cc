"""Exports of real tools, from hand-written samples of each."""

import json
from pathlib import Path

import pytest

from bco_lab.data.exports import conversation, langfuse_feedback, open_webui_feedback
from bco_lab.data.feedback import RecordError
from bco_lab.data.shapes import Unpaired
from bco_lab.data.tools import Langfuse, LangSmith, OpenWebUI

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> str:
    return str(SAMPLES / name)


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def rows(source) -> list[tuple[object, ...]]:
    data = source.load()
    return [tuple(row[key] for key in ("prompt", "completion", "label", "source", "id")) for row in data.train]


# --- Open WebUI


def test_open_webui_rates_a_message_after_the_turns_it_answers() -> None:
    source = OpenWebUI(path=sample("open_webui.json"), eval_fraction=0)
    egg = "How do I boil an egg?"
    assert rows(source) == [
        (chat(egg, "Eight minutes in boiling water.", "And soft?"), answer("Six minutes."), True, "llama3.1:8b", "f1"),
        (chat(egg), answer("I cannot help with cooking."), False, "llama3.1:8b", "f2"),
        (
            chat("Name a river in France.", system="Answer in one sentence."),
            answer("The Rhine, mostly."),
            False,
            "mistral:7b",
            "f3",
        ),
        (chat(egg), answer("Eight minutes in boiling water."), True, "llama3.1:8b", "f5"),
    ]
    data = source.load()
    assert data.report.left_out == {"no label": 2}
    assert data.train["timestamp"][0] == "2025-10-09T08:55:00+00:00"


@pytest.mark.parametrize(
    ("change", "column", "rule"),
    [
        ({"snapshot": None}, "snapshot.chat.chat", "there is no snapshot of the chat"),
        ({"meta": {"message_id": "zz"}}, "meta.message_id", "the message 'zz' is not in the snapshot"),
        ({"data": "up"}, "data", "must be an object, not 'up'"),
    ],
)
def test_open_webui_names_what_is_missing(change, column, rule) -> None:
    message = {"id": "m", "parentId": None, "role": "assistant", "content": "a"}
    chat_of = {"chat": {"chat": {"history": {"messages": {"m": message}}}}}
    record = {"id": "f", "data": {"rating": 1}, "meta": {"message_id": "m"}, "snapshot": chat_of} | change
    with pytest.raises(RecordError) as caught:
        open_webui_feedback(record)
    assert caught.value.column == column
    assert caught.value.rule.startswith(rule)


def test_open_webui_refuses_a_chat_in_a_circle() -> None:
    messages = {
        "a": {"id": "a", "parentId": "b", "role": "user", "content": "q"},
        "b": {"id": "b", "parentId": "a", "role": "assistant", "content": "r"},
    }
    snapshot = {"chat": {"chat": {"history": {"messages": messages}}}}
    with pytest.raises(RecordError, match="is its own ancestor"):
        open_webui_feedback({"data": {"rating": 1}, "meta": {"message_id": "b"}, "snapshot": snapshot})


# --- Langfuse

LANGFUSE = [
    (chat("What is HTTP 404?", system="Be brief."), answer("Not found."), True, "chat", "s1"),
    (chat("What is HTTP 500?"), answer("A teapot."), False, "chat", "s2"),
    (chat("Convert 1 km to miles."), answer("0.62 miles."), True, "chat", "s3"),
    (chat("Plan a day in Rome."), answer("Colosseum, then pizza."), True, "gpt-4o-mini", "s5"),
]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_langfuse_joins_scores_to_traces_and_observations(kind: str) -> None:
    source = Langfuse(
        path=sample(f"langfuse_scores.{kind}"),
        traces=sample(f"langfuse_traces.{kind}"),
        observations=sample("langfuse_observations.jsonl"),
        score_name="user-feedback",
        chat=True,
        eval_fraction=0,
    )
    assert rows(source) == LANGFUSE
    data = source.load()
    assert data.report.left_out == {"score named hallucination": 1, "no label": 1}
    assert data.train["timestamp"][0] == "2026-10-01T11:00:00.000Z"


def test_langfuse_says_what_it_cannot_join_or_read(tmp_path) -> None:
    traces = Path(sample("langfuse_traces.jsonl")).read_text().splitlines(keepends=True)
    (tmp_path / "first.jsonl").write_text(traces[0])
    wanted = {"path": sample("langfuse_scores.jsonl"), "score_name": "user-feedback"}
    with pytest.raises(ValueError, match=r"scores.jsonl, line 2, column 'traceId': trace t2 is not among the traces"):
        Langfuse(**wanted, traces=str(tmp_path / "first.jsonl"), chat=True).load()
    with pytest.raises(
        ValueError, match=r"line 5, column 'input': has task, budget: no prompt can be read from it; say"
    ):
        Langfuse(**wanted, traces=sample("langfuse_traces.jsonl"), chat=True).load()
    with pytest.raises(ValueError, match=r"^traces=null must be the file of the traces"):
        Langfuse(**wanted)
    with pytest.raises(ValueError, match=r"^traces=5 must be the name of a file"):
        Langfuse(**wanted, traces=5)
    with pytest.raises(ValueError, match=r"^prompt=5 must be a name or null$"):
        Langfuse(**wanted, traces="t.json", prompt=5)
    (tmp_path / "twice.jsonl").write_text(
        '{"id": "t", "input": "q"}\n{"id": "t", "input": "q"}\n{"id": "t", "input": "x"}'
    )
    with pytest.raises(ValueError, match=r"twice.jsonl, line 3: the id 't' is there twice, with other content$"):
        Langfuse(**wanted, traces=str(tmp_path / "twice.jsonl")).load()
    (tmp_path / "nameless.jsonl").write_text('{"input": "q"}')
    with pytest.raises(ValueError, match=r"nameless.jsonl, line 1: no column 'id'; the row has: input$"):
        Langfuse(**wanted, traces=str(tmp_path / "nameless.jsonl")).load()


def test_langfuse_takes_the_root_observation_for_a_trace_that_is_not_there(tmp_path) -> None:
    """The shape of enriched observations, which come without a file of traces."""
    observations = [
        {"id": "o1", "trace_id": "t", "parent_observation_id": "o2", "input": "tool", "output": "4"},
        {"id": "o2", "trace_id": "t", "parent_observation_id": "", "input": "q", "output": "a", "name": "root"},
    ]
    scores = [{"id": "s", "trace_id": "t", "name": "n", "value": 1, "data_type": "NUMERIC"}]
    for name, records in (("observations", observations), ("scores", scores)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    source = Langfuse(
        path=str(tmp_path / "scores.json"), observations=str(tmp_path / "observations.json"), score_name="n", chat=True
    )
    assert [each.prompt for each in source.feedback(scores[0])] == ["q"]


def test_a_path_says_where_prompt_and_completion_are() -> None:
    score = {"id": "s", "traceId": "t", "value": 1, "name": "n"}
    trace = {"id": "t", "input": {"state": {"turns": ["x", "q"]}}, "output": {"a": {"b": "r"}, "c": 2}}
    said = langfuse_feedback(score, trace, prompt="state.turns.1", completion="a.b")
    assert (said.prompt, said.completion, said.label) == ("q", "r", 1)
    with pytest.raises(RecordError, match=r"^column 'output': has no 'a.x'$"):
        langfuse_feedback(score, trace, prompt="state.turns.1", completion="a.x")


# --- LangSmith


def test_langsmith_joins_feedback_to_runs() -> None:
    source = LangSmith(
        path=sample("langsmith_feedback.jsonl"),
        runs=sample("langsmith_runs.jsonl"),
        key="user_score",
        chat=True,
        eval_fraction=0,
    )
    assert rows(source) == [
        (chat("Tell me a joke.", system="Be kind."), answer("Why did the chicken…"), True, "gpt-4o", "g1"),
        (chat("Hi", "Hello!", "Is water wet?"), answer("Yes."), True, "qa", "g2"),
        (chat("Spell cat."), answer("k-a-t"), False, "LangGraph", "g3"),
        (chat("Spell cat."), answer("k-a-t"), False, "LangGraph", "g6"),
    ]
    assert source.load().report.left_out == {"feedback of the key conciseness": 1, "no label": 1}


def test_langsmith_names_the_run_that_is_missing(tmp_path) -> None:
    (tmp_path / "feedback.jsonl").write_text('{"id": "g", "run_id": "r9", "key": "user_score", "score": 1}')
    with pytest.raises(ValueError, match=r"line 1, column 'run_id': run r9 is not among the runs given"):
        LangSmith(path=str(tmp_path / "feedback.jsonl"), runs=sample("langsmith_runs.jsonl"), key="user_score").load()


# --- inputs and outputs of applications


@pytest.mark.parametrize(
    ("given", "returned", "expected"),
    [
        ("q", "a", ("q", "a")),
        ('{"question": "q"}', '{"answer": "a"}', ("q", "a")),
        ('{"broken": ', "a", ('{"broken": ', "a")),
        ({"topic": "q"}, {"reply": "a"}, ("q", "a")),  # the only key there is
        ({"args": ["q"], "kwargs": {}}, "a", ("q", "a")),
        ({"messages": [{"role": "user", "content": "q"}]}, "a", (chat("q"), answer("a"))),
        ("q", {"role": "assistant", "content": "a"}, (chat("q"), answer("a"))),
        ([["human", "q"]], [["ai", "a"]], (chat("q"), answer("a"))),
        ([{"type": "human", "data": {"content": "q"}}], {"choices": [{"text": "a"}]}, (chat("q"), answer("a"))),
        (chat("q"), chat("q", "a"), (chat("q"), answer("a"))),
        ({"input": "q", "history": chat("x", "y")}, "a", (chat("x", "y", "q"), answer("a"))),
    ],
)
def test_usual_shapes_are_understood(given, returned, expected) -> None:
    assert conversation(given, returned, names=("input", "output")) == expected


@pytest.mark.parametrize(
    ("given", "returned", "column", "rule"),
    [
        (None, "a", "input", "is null: no prompt can be read from it; say where it is with dataset.prompt=PATH"),
        ("q", {"x": 1, "y": 2}, "output", "has x, y: no completion can be read from it"),
        ([{"role": "tool", "content": "4"}], "a", "input[0]", "a message of the role 'tool' is not supported"),
        (
            "q",
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            "output[0]",
            "the message has no text: it call",
        ),
        (
            "q",
            {"role": "assistant", "content": [{"type": "image_url"}]},
            "output[0]",
            "a part of the type 'image_url' is",
        ),
        (chat("q"), chat("q"), "output", "repeats the input and adds no answer"),
        ({"input": "q", "history": "Human: x"}, "a", "input", "the earlier turns are a text, not messages"),
    ],
)
def test_other_shapes_are_named(given, returned, column, rule) -> None:
    with pytest.raises(RecordError) as caught:
        conversation(given, returned, names=("input", "output"))
    assert caught.value.column == column
    assert caught.value.rule.startswith(rule)


@pytest.mark.parametrize(
    "returned",
    [
        {"generations": {"text": "a"}},
        [{"lc": 1, "id": 3, "kwargs": {"content": "a"}}],
        [{"lc": 1, "id": ["AIMessage"], "kwargs": "a"}],
        [{"type": "ai", "data": "a"}],
        "[" * 100_000,
    ],
)
def test_a_record_of_another_shape_is_rejected_not_a_crash(tmp_path, returned) -> None:
    scores = [{"id": f"s{i}", "traceId": f"t{i}", "name": "n", "value": i % 2} for i in range(3)]
    traces = [{"id": f"t{i}", "input": "q", "output": f"a{i}"} for i in range(2)]
    traces.append({"id": "t2", "input": "q", "output": returned})
    for name, found in (("scores", scores), ("traces", traces)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    source = Langfuse(
        path=str(tmp_path / "scores.json"),
        traces=str(tmp_path / "traces.json"),
        score_name="n",
        on_error="skip",
        chat=True,
        eval_fraction=0,
    )
    assert source.load().report.rows + len(source.load().rejected) == 3


# --- plain tables


def test_the_sample_of_a_table_reads_with_its_maps() -> None:
    source = Unpaired(
        path=sample("columns.csv"),
        columns={"prompt": "question", "completion": "answer", "label": "thumb", "source": "model"},
        label_map={"up": True, "1": True, "down": False, "-1": False},
        eval_fraction=0,
    )
    data = source.load()
    assert data.train["label"][:] == [True, False, True, False]
    assert data.train["completion"][:] == ["Yes.", "No.", "Yes, it is.", "Perhaps."]
    assert data.train["source"][:] == ["m1", "m2", "m1", "m2"]
    assert data.report.left_out == {"no label": 1}
