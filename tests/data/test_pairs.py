from typing import Any

import pytest
from datasets import Dataset

from bco_lab.data.pairs import unpair


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [message("user", "Which colour is the sky?")]
BLUE, GREEN = [message("assistant", "Blue.")], [message("assistant", "Green.")]


def rows_of(*pairs: dict[str, Any], streamed: bool = False) -> list[dict[str, Any]]:
    dataset = Dataset.from_list(list(pairs))
    return list(unpair(dataset.to_iterable_dataset() if streamed else dataset, name="train"))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_pair_becomes_a_desirable_and_an_undesirable_row_that_follow_each_other(streamed: bool) -> None:
    pairs = [
        {"prompt": "A", "chosen": "b", "rejected": "c", "source": "x"},
        {"prompt": "D", "chosen": "e", "rejected": "f", "source": "y"},
    ]
    assert rows_of(*pairs, streamed=streamed) == [
        {"source": "x", "prompt": "A", "completion": "b", "label": True},
        {"source": "x", "prompt": "A", "completion": "c", "label": False},
        {"source": "y", "prompt": "D", "completion": "e", "label": True},
        {"source": "y", "prompt": "D", "completion": "f", "label": False},
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue", "The sky is green", ("The sky is", " blue", " green")),
        ("2+2=4", "2+2=5", ("2+2=", "4", "5")),
        ("yes", "no", ("", "yes", "no")),
        (
            "\n\nHuman: Hi\n\nAssistant: Well, yes",
            "\n\nHuman: Hi\n\nAssistant: Well, no",
            ("\n\nHuman: Hi\n\nAssistant:", " Well, yes", " Well, no"),
        ),
    ],
)
def test_the_implicit_prompt_of_texts_is_what_they_share(
    chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    up, down = rows_of({"chosen": chosen, "rejected": rejected})
    assert (up["prompt"], up["completion"], down["completion"]) == expected
    assert (down["prompt"], up["label"], down["label"]) == (expected[0], True, False)


@pytest.mark.parametrize(
    "pair",
    [
        {"chosen": ASKED + BLUE, "rejected": ASKED + GREEN},
        {"prompt": "Which colour is the sky?", "chosen": ASKED + BLUE, "rejected": ASKED + GREEN},
        {"prompt": ASKED, "chosen": ASKED + BLUE, "rejected": ASKED + GREEN},
        {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN},
    ],
    ids=["implicit", "prompt as text", "prompt repeated", "explicit"],
)
def test_conversations_are_parted_where_the_answers_begin(pair: dict[str, Any]) -> None:
    assert rows_of(pair) == [
        {"prompt": ASKED, "completion": BLUE, "label": True},
        {"prompt": ASKED, "completion": GREEN, "label": False},
    ]


def test_ids_stay_unique() -> None:
    pairs = [{"prompt": "A", "chosen": "b", "rejected": "c", "example_id": i} for i in (7, 9)]
    assert [row["example_id"] for row in rows_of(*pairs)] == [14, 15, 18, 19]


def test_single_thumbs_stay_as_they_are() -> None:
    dataset = Dataset.from_list([{"prompt": "A", "completion": "b", "label": True}])
    assert unpair(dataset, name="train") is dataset


def test_several_processes_give_the_same_rows() -> None:
    dataset = Dataset.from_list([{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(5)])
    assert list(unpair(dataset, name="train", num_proc=2)) == list(unpair(dataset, name="train"))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"chosen": "a", "rejected": "a"}, "eval, row 0: chosen and rejected are equal"),
        ({"chosen": "", "rejected": "a"}, "eval, row 0, column 'chosen': must be text or a list of messages, not ''"),
        ({"chosen": BLUE, "rejected": GREEN}, "eval, row 0: chosen and rejected share no message"),
        ({"chosen": BLUE, "rejected": "Green."}, "eval, row 0: chosen and rejected must be of one kind"),
        ({"chosen": "a", "rejected": "b", "completion": "c"}, r"eval: .*a column 'completion': remove either"),
        ({"chosen": "a", "rejected": "b", "ref_logps": 0.5}, r"eval: .*a column 'ref_logps': remove either"),
    ],
)
def test_a_pair_that_breaks_a_rule_is_named(pair: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(unpair(Dataset.from_dict({key: [value] for key, value in pair.items()}), name="eval"))


def test_a_null_is_named_with_its_row() -> None:
    with pytest.raises(
        ValueError, match="train, row 1, column 'rejected': must be text or a list of messages, not None"
    ):
        rows_of({"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": None})
