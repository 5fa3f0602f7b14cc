"""Prompts and completions as text: what a row may hold, and how a chat template lays it out."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2.exceptions import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = Sequence[Mapping[str, Any]]


class PairedText(NamedTuple):
    """Prompt and completion as the one text that is tokenised.

    Attributes:
        text: Prompt followed by completion.
        boundary: Characters of the prompt.
    """

    text: str
    boundary: int


def check_text(value: Any, part: str) -> None:
    """Refuse what is neither a string nor a list of chat messages.

    Args:
        value: What the row holds.
        part: "prompt" or "completion"; a completion of messages starts with the assistant's.

    Raises:
        ValueError: Names the value and the rule; the caller adds file, row and column.
    """
    if isinstance(value, str):
        _check_characters(value, part)
        return
    if not (value and isinstance(value, list | tuple)):
        found = "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
        raise ValueError(f"{part} must be a string or a list of at least one message, not {found}")
    for number, message in enumerate(value):
        _check_message(message, f"{part}[{number}]")
    if part == "completion" and value[0]["role"] != "assistant":
        raise ValueError(f"completion[0] must have the role 'assistant', not {value[0]['role']!r}")


def check_pair(prompt: Any, completion: Any) -> None:
    """Refuse a row that has a string on one side and messages on the other.

    Raises:
        ValueError: Names the rule; the caller adds file and row.
    """
    kinds = ["a string" if isinstance(value, str) else "a list of messages" for value in (prompt, completion)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"prompt is {kinds[0]} but completion is {kinds[1]}; both must be of one kind")


def check_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that cannot lay out messages.

    Raises:
        ValueError: Names the tokenizer and what to do.
    """
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer {name!r} has no chat template, which rows made of messages need: "
            "set tokenizer.chat_template, or write prompts and completions as strings"
        )


def apply_template(tokenizer: "PreTrainedTokenizerBase", prompt: Messages, completion: Messages) -> PairedText:
    """Lay out a conversation; the completion starts where generation would.

    The boundary is the end of the prompt with the generation prompt. Some templates write a prompt differently once an
    answer follows it (they drop earlier reasoning, or open a reasoning block only to generate); there the boundary is
    where the answer's content starts. So it is, too, where the prompt ends with a message of the assistant, which the
    completion continues.

    Raises:
        ValueError: The template refuses the messages.
    """
    try:
        text = _render(tokenizer, _join(prompt, completion))
        if prompt[-1]["role"] != "assistant":
            opening = _render(tokenizer, prompt, add_generation_prompt=True)
            if text.startswith(opening):
                return PairedText(text, len(opening))
        # Two answers to one prompt differ from the first character of their content on, not before. A character of the
        # private use area is in no template and seldom in a text.
        content = completion[0]["content"]
        probe = {**completion[0], "content": "\ue001" if content.lstrip().startswith("\ue000") else "\ue000"}
        other = _render(tokenizer, _join(prompt, [probe, *completion[1:]]))
    except (TemplateError, ValueError, TypeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"the chat template refuses the messages: {reason}") from error
    return PairedText(text, common_prefix(text, other))


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common from the start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _join(prompt: Messages, completion: Messages) -> list[Mapping[str, Any]]:
    """The whole conversation; an assistant message at the end of the prompt and the completion's first are one."""
    if prompt[-1]["role"] != "assistant":
        return [*prompt, *completion]
    continued = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
    return [*prompt[:-1], continued, *completion[1:]]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Messages, **options: Any) -> str:
    rendered = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options)
    assert isinstance(rendered, str)
    return rendered


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds {text[error.start]!r}, half of a character, at position {error.start}"
        ) from None


def _check_message(message: Any, where: str) -> None:
    fields = message if isinstance(message, Mapping) else {}
    for key in ("role", "content"):
        if key not in fields or not isinstance(fields[key], str):
            raise ValueError(f"{where} must be a message with a string {key!r}, not {reprlib.repr(message)}")
    _check_characters(message["content"], where)
    if message["role"] not in ROLES:
        raise ValueError(f"{where} has the role {message['role']!r}, which is none of {', '.join(ROLES)}")
    extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise ValueError(f"{where} has {', '.join(map(repr, extra))}; only role and content are used")
