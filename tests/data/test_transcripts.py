import pytest

from bco_lab.data.feedback import Feedback, RecordError
from bco_lab.data.transcripts import as_chat


def chat(prompt, completion="a", system=None) -> tuple[object, object]:
    said = as_chat(Feedback(prompt, completion, True), system)
    return said.prompt, said.completion


def test_a_string_is_a_message_of_the_user() -> None:
    assert chat(" q\n", " a ") == (
        [{"role": "user", "content": " q\n"}],
        [{"role": "assistant", "content": "a"}],
    )


def test_a_transcript_is_read_turn_by_turn() -> None:
    prompt, _ = chat("\n\nHuman: How\n\nmany? \n\nAssistant: Two.\n\nHuman: Sure?\n\nAssistant:")
    assert prompt == [
        {"role": "user", "content": "How\n\nmany?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "What does Human: mean?",
        "\n\nHuman: a question without the answer's mark",
        "Note.\n\nHuman: q\n\nAssistant:",
        "\n\nHuman: q\n\nAssistant: half an answer",
    ],
)
def test_other_strings_are_no_transcripts(text: str) -> None:
    assert chat(text)[0] == [{"role": "user", "content": text}]


def test_the_system_message_stands_in_front_once() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert chat("q", system="Be brief.")[0] == [system, {"role": "user", "content": "q"}]
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "q"}]
    assert chat(own, [{"role": "assistant", "content": "a"}], "Be brief.")[0] == own


def test_an_empty_prompt_is_no_message() -> None:
    with pytest.raises(RecordError, match=r"^column 'prompt': a message of the user needs text"):
        chat("  ")
    with pytest.raises(RecordError, match=r"^column 'prompt': a turn of the transcript has no text$"):
        chat("\n\nHuman: \n\nAssistant:")
