import random
from typing import Any

import pytest
import tiny
from datasets import Dataset, Features, IterableDataset, List, Value

from bco_lab.data.pairs import unpair
from bco_lab.data.tokenization import tokenize_dataset


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
        ("The sky is", "The sky is blue", ("The sky is", "", " blue")),
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


def test_prompt_and_completion_put_together_are_the_texts_that_were_given() -> None:
    draw = random.Random(0)
    pairs = [
        {key: "".join(draw.choices("a \n", k=draw.randint(0, 6))) for key in ("chosen", "rejected")} for _ in range(300)
    ]
    pairs = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
    rows = rows_of(*pairs)
    assert [row["prompt"] + row["completion"] for row in rows] == [pair[key] for pair in pairs for key in pair]
    for up, down in zip(rows[::2], rows[1::2], strict=True):
        assert up["prompt"] == down["prompt"]
        assert not up["prompt"].endswith(" ") or (up["completion"][:1], down["completion"][:1]) == (" ", " ")
        shared = [one for one, other in zip(up["completion"], down["completion"], strict=False) if one == other]
        assert up["completion"][:1] != down["completion"][:1] or shared[0] == " "


@pytest.mark.parametrize(
    ("prompt", "chosen", "completion"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: Yes", " Yes"),
        ("Question: 2+2\nAnswer:", "Question: 2+2\nAnswer: Yes", " Yes"),
        ("Hi", "Hi there", "Hi there"),  # an answer may well begin like this
        ("Hi\n", "Hi\nYes", "Hi\nYes"),
    ],
)
def test_a_transcript_in_front_of_both_answers_is_the_prompt_only(prompt: str, chosen: str, completion: str) -> None:
    rejected = chosen[: -len("Yes")] + "No"
    up, down = rows_of({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (up["prompt"], up["completion"]) == (prompt, completion)
    assert (down["prompt"], down["completion"]) == (prompt, completion[: -len("Yes")] + "No")
    # Only one of both: then it is what the model wrote.
    up, down = rows_of({"prompt": prompt, "chosen": chosen, "rejected": "No"})
    assert (up["completion"], down["completion"]) == (chosen, "No")


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


def test_a_conversation_is_parted_after_the_last_message_in_common() -> None:
    history = [*ASKED, *BLUE, message("user", "Always?")]
    yes, no = [message("assistant", "Yes.")], [message("assistant", "No."), message("user", "?"), *BLUE]
    assert [row["prompt"] for row in rows_of({"chosen": history + yes, "rejected": history + no})] == [history] * 2
    assert [row["completion"] for row in rows_of({"chosen": history + yes, "rejected": history + no})] == [yes, no]


def test_keys_that_are_null_in_one_column_and_lack_in_the_other_do_not_part_messages() -> None:
    noted = [{**each, "name": None} for each in ASKED + GREEN]
    assert [row["prompt"] for row in rows_of({"chosen": ASKED + BLUE, "rejected": noted})] == [ASKED] * 2
    assert [row["completion"] for row in rows_of({"chosen": noted, "rejected": ASKED + BLUE})] == [GREEN, BLUE]


def test_ids_stay_unique() -> None:
    pairs = [{"prompt": "A", "chosen": "b", "rejected": "c", "example_id": i} for i in (7, 9)]
    assert [row["example_id"] for row in rows_of(*pairs)] == [14, 15, 18, 19]


def test_ids_are_those_that_rows_without_ids_get() -> None:
    pairs = [{"prompt": f"w{i}", "chosen": "w8", "rejected": "w9"} for i in range(2, 5)]
    given = [{**pair, "example_id": i} for i, pair in enumerate(pairs)]
    with_ids, without = (
        tokenize_dataset(unpair(Dataset.from_list(each), name="train"), tiny.tokenizer(), max_length=9)[0].to_list()
        for each in (given, pairs)
    )
    assert with_ids == without
    assert [row["example_id"] for row in without] == [0, 1, 2, 3, 4, 5]


def test_numbers_for_weighting_go_to_both_rows_and_a_label_of_the_pair_does_not() -> None:
    pair = {"prompt": "A", "chosen": "b", "rejected": "c", "p_desirable": 0.25, "example_weight": 2.0, "label": 7}
    assert [(row["p_desirable"], row["example_weight"], row["label"]) for row in rows_of(pair)] == [
        (0.25, 2.0, True),
        (0.25, 2.0, False),
    ]


def test_single_thumbs_stay_as_they_are() -> None:
    for column in ("completion", "chosen"):
        dataset = Dataset.from_list([{"prompt": "A", column: "b", "label": True}])
        assert unpair(dataset, name="train") is dataset
        stream = dataset.to_iterable_dataset()
        assert unpair(stream, name="train") is stream


@pytest.mark.parametrize(
    "pair",
    [
        {"prompt": "A", "chosen": "b", "rejected": ""},
        {"chosen": "The sky is blue", "rejected": "The sky is green", "example_id": 3},
        {"prompt": ASKED, "chosen": ASKED + BLUE, "rejected": ASKED + GREEN, "source": "x"},
        {"chosen": ASKED + BLUE, "rejected": ASKED + GREEN},
    ],
)
def test_streams_and_several_processes_give_the_same_rows(pair: dict[str, Any]) -> None:
    pairs = [{**pair, "number": i} for i in range(5)]
    dataset = Dataset.from_list(pairs)
    expected = list(unpair(dataset, name="train"))
    assert len(expected) == 10
    assert list(unpair(dataset, name="train", num_proc=2)) == expected
    assert list(unpair(dataset.to_iterable_dataset(), name="train")) == expected
    assert list(unpair(IterableDataset.from_generator(lambda: iter(pairs)), name="train")) == expected


def test_the_types_do_not_depend_on_the_rows() -> None:
    messages = List({"role": Value("string"), "content": Value("string")})
    given = Features({"chosen": messages, "rejected": messages, "note": Value("string"), "example_id": Value("int32")})
    pairs = [{"chosen": ASKED + BLUE, "rejected": ASKED + GREEN, "note": None, "example_id": 1}]
    dataset = Dataset.from_list(pairs, features=given)
    expected = Features(
        {"note": Value("string"), "example_id": Value("int64"), "prompt": messages, "completion": messages}
        | {"label": Value("bool")}
    )
    assert unpair(dataset, name="train").features == expected
    assert unpair(dataset.to_iterable_dataset(), name="train").features == expected


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"chosen": "a", "rejected": "a"}, "eval, row 0: chosen and rejected are equal"),
        (
            {"chosen": 3, "rejected": 4},
            "eval, row 0, column 'chosen': chosen must be a string or a list of at least one message, not int 3",
        ),
        (
            {"prompt": None, "chosen": "a", "rejected": "b"},
            "eval, row 0, column 'prompt': prompt must be a string or a list .*, not null",
        ),
        ({"prompt": ASKED, "chosen": "a", "rejected": "b"}, "eval, row 0: prompt is a list of messages but chosen and"),
        ({"chosen": BLUE, "rejected": GREEN}, "eval, row 0: chosen and rejected share no message"),
        (
            {"chosen": ASKED + BLUE, "rejected": ASKED + BLUE + ASKED + GREEN},
            r"eval, row 0, column 'chosen': after the prompt: completion must be .* one message, not list \[\]",
        ),
        (
            {"chosen": ASKED + BLUE, "rejected": ASKED + ASKED},
            r"eval, row 0, column 'rejected': after the prompt: completion\[0\] must have the role 'assistant'",
        ),
        (
            {"chosen": [{**BLUE[0], "name": "x"}], "rejected": GREEN},
            r"eval, row 0, column 'chosen': chosen\[0\] has 'name'; only role and",
        ),
        ({"chosen": BLUE, "rejected": "Green."}, "eval, row 0: chosen and rejected must be of one kind"),
        ({"chosen": "a", "rejected": "b", "completion": "c"}, r"eval: .*a column 'completion': remove either"),
        ({"chosen": "a", "rejected": "b", "ref_logps": 0.5}, r"eval: .*a column 'ref_logps': remove either"),
        ({"chosen": "a", "rejected": "b", "input_ids": [1]}, r"eval: .*a column 'input_ids': remove either"),
        (
            {"chosen": "a", "rejected": "b", "example_id": None},
            "eval, row 0, column 'example_id': None must be a whole",
        ),
        (
            {"chosen": "a", "rejected": "b", "example_id": "r7"},
            "eval, row 0, column 'example_id': 'r7' must be a whole",
        ),
        (
            {"chosen": "a", "rejected": "b", "example_id": 2**62},
            "eval, row 0, column 'example_id': 4611686018427387904",
        ),
    ],
)
def test_a_pair_that_breaks_a_rule_is_named(pair: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(unpair(Dataset.from_dict({key: [value] for key, value in pair.items()}), name="eval"))


def test_a_null_is_named_with_its_row() -> None:
    with pytest.raises(
        ValueError,
        match="train, row 1, column 'rejected': rejected must be a string or a list of at least one message, not null",
    ):
        rows_of({"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": None})
