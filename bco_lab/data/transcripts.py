"""Strings to chat messages."""

import re
from dataclasses import replace

from bco_lab.data.feedback import Feedback, RecordError

HUMAN, ASSISTANT = "Human:", "Assistant:"
_TURN = re.compile(rf"(?:\A|\n\n)({HUMAN}|{ASSISTANT})")
_ROLES = {HUMAN: "user", ASSISTANT: "assistant"}


def as_chat(feedback: Feedback, system: str | None) -> Feedback:
    """The same feedback with messages in place of strings; messages stay as they are.

    A prompt that starts with `Human:` and ends with `Assistant:`, as those of hh-rlhf do, becomes one message for each
    turn. Any other string is one message of the user.

    Args:
        feedback: Prompt and completion are checked later; what is neither string nor messages passes through.
        system: A system message in front, unless the prompt has one; None for none.

    Raises:
        RecordError: A prompt without text, which no message can hold.
    """
    prompt, completion = feedback.prompt, feedback.completion
    if isinstance(prompt, str):
        prompt = _turns(prompt)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion.strip()}]
    if system is not None and isinstance(prompt, list) and not _has_system(prompt):
        prompt = [{"role": "system", "content": system}, *prompt]
    return replace(feedback, prompt=prompt, completion=completion)


def _turns(prompt: str) -> list[dict[str, str]]:
    parts = _TURN.split(prompt)
    # Text before the first mark, then mark and text in turn; a transcript starts with the human's and ends with the
    # empty turn of the assistant.
    transcript = len(parts) > 3 and not parts[0].strip() and parts[1] == HUMAN and parts[-2] == ASSISTANT
    if transcript and not parts[-1].strip():
        pairs = zip(parts[1:-2:2], parts[2:-2:2], strict=True)
        turns = [{"role": _ROLES[mark], "content": text.strip()} for mark, text in pairs]
        if all(turn["content"] for turn in turns):
            return turns
        raise RecordError("prompt", "a turn of the transcript has no text")
    if not prompt.strip():
        raise RecordError("prompt", "a message of the user needs text, the prompt has none")
    return [{"role": "user", "content": prompt}]


def _has_system(messages: list[object]) -> bool:
    first = messages[0] if messages else None
    return isinstance(first, dict) and first.get("role") == "system"
