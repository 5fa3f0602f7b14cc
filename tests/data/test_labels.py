from decimal import Decimal

import numpy as np
import pytest

from bco_lab.data.labels import check_both_classes, check_scale, parse_label


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (True, True),
        (False, False),
        (np.bool_(True), True),
        (np.bool_(False), False),
        (1, True),
        (0, False),
        (-1, False),
        (1.0, True),
        (-1.0, False),
        (np.int64(-1), False),
        (np.float32(1), True),
        (Decimal("0.0"), False),
        ("1", True),
        ("0", False),
        ("-1", False),
        (" UP ", True),
        ("down", False),
        ("True", True),
        ("FALSE", False),
        ("yes", True),
        ("no", False),
        ("good", True),
        ("bad", False),
        ("thumbs_up", True),
        ("Thumbs Down", False),
        ("thumbs-up", True),
        ("chosen", True),
        ("rejected", False),
        ("desirable", True),
        ("Undesirable", False),
        ("👍", True),
        ("👎", False),
        ("👍🏽", True),
        ("👎\ufe0f", False),
    ],
)
def test_parse_label_reads_every_accepted_form(value: object, label: bool) -> None:
    assert parse_label(value) is label


@pytest.mark.parametrize("value", [2, 0.5, float("nan"), None, "", "maybe", "updown", [True], {"label": 1}])
def test_parse_label_refuses_anything_else_naming_value_and_rule(value: object) -> None:
    with pytest.raises(ValueError, match=r"label .* is none of true/false, 1/0, 1/-1, up/down") as caught:
        parse_label(value)
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_label_map_replaces_the_rules() -> None:
    label_map = {"keep": True, 5: True, "up": False, None: False}
    assert parse_label("keep", label_map=label_map) is True
    assert parse_label("5", label_map=label_map) is True
    assert parse_label("up", label_map=label_map) is False
    assert parse_label(None, label_map=label_map) is False
    with pytest.raises(ValueError, match=r"label 'down' is not a key of label_map, which has: 'keep', 5, 'up', None"):
        parse_label("down", label_map=label_map)
    with pytest.raises(ValueError, match=r"label 'None' is not a key"):
        parse_label("None", label_map=label_map)


def test_label_map_matches_numbers_written_as_text() -> None:
    assert parse_label(4, label_map={"4": True, "1": False}) is True


def test_label_map_must_map_to_true_or_false() -> None:
    with pytest.raises(ValueError, match=r"label_map\['up'\]='yes' must be true or false"):
        parse_label("up", label_map={"up": "yes"})  # type: ignore[dict-item]


def test_check_both_classes_names_the_class_that_is_missing() -> None:
    check_both_classes([True, False, True], "log")
    with pytest.raises(
        ValueError, match=r"^log: only one class present, all 3 labels are desirable; add undesirable rows$"
    ):
        check_both_classes([True] * 3, "log")
    with pytest.raises(
        ValueError, match=r"^log: only one class present, all 2 labels are undesirable; add desirable rows$"
    ):
        check_both_classes([False] * 2, "log")
    with pytest.raises(ValueError, match=r"^log: there are no rows"):
        check_both_classes([], "log")


def test_check_scale_refuses_zero_next_to_minus_one() -> None:
    check_scale([0, 1, "up", False], "log")
    check_scale([-1, 1, False], "log")
    with pytest.raises(ValueError, match=r"^log: both 0 and -1 occur; give a label_map"):
        check_scale([1, 0, "-1"], "log")
