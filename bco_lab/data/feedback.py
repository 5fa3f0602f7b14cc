"""One thumb as a feedback log tells it, before anything is checked."""

from dataclasses import dataclass, field
from typing import Any


class RecordError(ValueError):
    """A record that breaks a rule.

    Attributes:
        column: What of the record is wrong; a dotted path for nested records, such as `data.rating`. None: all of it.
        rule: What is wrong with it.
    """

    def __init__(self, column: str | None, rule: str) -> None:
        super().__init__(rule if column is None else f"column {column!r}: {rule}")
        self.column = column
        self.rule = rule


@dataclass(frozen=True)
class Feedback:
    """What a record says of one completion.

    Attributes:
        prompt: A string, or messages with `role` and `content`.
        completion: The same kind; messages start with the assistant's.
        label: As the log has it (see `parse_label`); None where nobody gave a thumb.
        source: Which model or application wrote the completion, if the log says.
        id: The log's own name of the feedback.
        timestamp: When the feedback was given, ISO 8601.
        numbers: Of `example_weight` and `p_desirable`, those that the log brings.
    """

    prompt: Any
    completion: Any
    label: Any
    source: str | None = None
    id: str | None = None
    timestamp: str | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
