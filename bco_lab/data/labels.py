"""Thumbs-up and thumbs-down in whatever form a feedback log writes them."""

import numbers
import reprlib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

ACCEPTED = (
    "true/false, 1/0, 1/-1, up/down, yes/no, good/bad, thumbs_up/thumbs_down, chosen/rejected, "
    "desirable/undesirable, 👍/👎"
)

_DESIRABLE = "true 1 1.0 +1 up yes good thumbs_up thumbsup chosen desirable 👍"
_UNDESIRABLE = "false 0 0.0 -1 -1.0 down no bad thumbs_down thumbsdown rejected undesirable 👎"
_WORDS = dict.fromkeys(_DESIRABLE.split(), True) | dict.fromkeys(_UNDESIRABLE.split(), False)
# Logs keep the emoji as typed: with a skin tone or the variation selector that phones append.
_EMOJI_MODIFIERS = dict.fromkeys([0xFE0E, 0xFE0F, *range(0x1F3FB, 0x1F400)])


def parse_label(value: Any, *, label_map: Mapping[Any, bool] | None = None) -> bool:
    """The label a feedback value stands for: True is desirable, False undesirable.

    Words are compared without case and surrounding space. A map replaces these rules: a value (or its string) that is
    not one of its keys is an error.

    Args:
        value: A bool, a number (1, 0, -1) or a word, as it stands in the log.
        label_map: Value to label, for logs with their own words.

    Raises:
        ValueError: The value is none of these. The message names value and rule; the caller adds file, row and column.
    """
    if label_map is not None:
        return _look_up(value, label_map)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, numbers.Real | Decimal) and value in (1, 0, -1):
        return bool(value == 1)
    if isinstance(value, str):
        word = value.strip().casefold().translate(_EMOJI_MODIFIERS)
        for spelling in (word, word.replace(" ", "_").replace("-", "_")):
            if spelling in _WORDS:
                return _WORDS[spelling]
    raise ValueError(f"label {reprlib.repr(value)} is none of {ACCEPTED}; give a label_map for other values")


def check_both_classes(labels: Iterable[bool], name: str) -> None:
    """Refuse labels of one class only: the loss compares desirable with undesirable rewards.

    Raises:
        ValueError: All labels are equal, or there are none. The message begins with `name`.
    """
    found = list(labels)
    if not found:
        raise ValueError(f"{name}: there are no rows; desirable and undesirable ones are needed")
    if all(found) or not any(found):
        present, absent = ("desirable", "undesirable") if found[0] else ("undesirable", "desirable")
        raise ValueError(f"{name}: only one class present, all {len(found)} labels are {present}; add {absent} rows")


def check_scale(values: Iterable[Any], name: str) -> None:
    """Refuse labels that use both 0 and -1: on such a scale 0 often means no feedback, not thumbs-down.

    Raises:
        ValueError: Both occur. The message begins with `name`.
    """
    written = {str(value) for value in values if not isinstance(value, bool | np.bool_)}
    if written & {"0", "0.0"} and written & {"-1", "-1.0"}:
        raise ValueError(f"{name}: both 0 and -1 occur; give a label_map, or remove the rows without feedback")


def _look_up(value: Any, label_map: Mapping[Any, bool]) -> bool:
    matches = [key for key in label_map if key == value] or [
        key for key in label_map if value is not None and key is not None and str(key) == str(value)
    ]
    if not matches:
        keys = ", ".join(repr(key) for key in label_map)
        raise ValueError(f"label {reprlib.repr(value)} is not a key of label_map, which has: {keys}")
    label = label_map[matches[0]]
    if label is True or label is False:
        return label
    raise ValueError(f"label_map[{matches[0]!r}]={label!r} must be true or false")
