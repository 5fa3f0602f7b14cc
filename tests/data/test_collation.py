import torch

from bco_lab.data.collation import FeedbackCollator

ROWS = [
    {"input_ids": [5, 6, 7], "prompt_length": 1, "label": True, "example_id": 10},
    {"input_ids": [8, 9, 3, 4, 2], "prompt_length": 3, "label": False, "example_id": 3},
]


def test_rows_are_padded_on_the_right_and_completions_marked() -> None:
    batch = FeedbackCollator(pad_token_id=99)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 99, 99], [8, 9, 3, 4, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["completion_mask"].int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert batch["label"].tolist() == [True, False]
    assert batch["example_id"].tolist() == [10, 3]
    types = {key: value.dtype for key, value in batch.items()}
    assert types == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "completion_mask": torch.bool,
        "label": torch.bool,
        "example_id": torch.int64,
    }


def test_a_pad_token_inside_a_row_is_still_attended_to() -> None:
    batch = FeedbackCollator(pad_token_id=2)(ROWS)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5]
    assert batch["completion_mask"][1].tolist() == [False, False, False, True, True]


def test_width_is_rounded_up_to_a_multiple() -> None:
    batch = FeedbackCollator(pad_to_multiple_of=4)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [8, 9, 3, 4, 2, 0, 0, 0]]
    assert batch["completion_mask"].sum(dim=1).tolist() == [2, 2]
    assert FeedbackCollator(pad_to_multiple_of=5)(ROWS)["input_ids"].shape[1] == 5


def test_optional_columns_are_collated_only_if_the_rows_have_them() -> None:
    rows = [row | {"ref_logps": -1.5, "example_weight": 2} for row in ROWS]
    batch = FeedbackCollator()(rows)
    assert batch["ref_logps"].tolist() == [-1.5, -1.5]
    assert batch["example_weight"].tolist() == [2.0, 2.0]
    assert batch["ref_logps"].dtype == batch["example_weight"].dtype == torch.float32


def test_an_encoder_decoder_gets_prompts_and_shifted_completions() -> None:
    batch = FeedbackCollator(pad_token_id=99, decoder_start_token_id=0)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 99, 99], [8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["target_ids"].tolist() == [[6, 7], [4, 2]]
    assert batch["decoder_input_ids"].tolist() == [[0, 6], [0, 4]]
    assert batch["completion_mask"].tolist() == [[True, True], [True, True]]
    uneven = FeedbackCollator(pad_token_id=99, decoder_start_token_id=0)([ROWS[0] | {"prompt_length": 2}, ROWS[1]])
    assert uneven["target_ids"].tolist() == [[7, 99], [4, 2]]
    assert uneven["decoder_input_ids"].tolist() == [[0, 7], [0, 4]]
    assert uneven["completion_mask"].tolist() == [[True, False], [True, True]]


def test_an_encoder_decoder_keeps_pad_tokens_of_the_texts_and_the_other_columns() -> None:
    rows = [row | {"ref_logps": -1.5, "example_weight": 2} for row in ROWS]
    batch = FeedbackCollator(pad_token_id=7, pad_to_multiple_of=4, decoder_start_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[5, 7, 7, 7], [8, 9, 3, 7]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [1, 3]
    assert batch["target_ids"].tolist() == [[6, 7, 7, 7], [4, 2, 7, 7]]
    assert batch["decoder_input_ids"].tolist() == [[0, 6, 7, 7], [0, 4, 2, 7]]
    assert batch["completion_mask"].sum(dim=1).tolist() == [2, 2]  # the second token of the first row is a 7 of its own
    assert {key: batch[key].tolist() for key in ("label", "example_id", "ref_logps", "example_weight")} == {
        "label": [True, False],
        "example_id": [10, 3],
        "ref_logps": [-1.5, -1.5],
        "example_weight": [2.0, 2.0],
    }
    integers = {"input_ids", "attention_mask", "decoder_input_ids", "target_ids", "example_id"}
    assert {key for key, value in batch.items() if value.dtype == torch.int64} == integers
    assert batch["completion_mask"].dtype == torch.bool
