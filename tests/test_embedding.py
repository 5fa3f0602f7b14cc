from typing import Any

import numpy as np
import pytest
import torch
from tiny_bert import LIMIT, Encoder, tokenizer

from bco_lab.embedding import distinct, embed_counting, embed_prompts, raw_prompt_text, token_limit

PROMPTS = ["w9", "w4 w5 w6 w7", "w9", "w8 w8", " ".join(f"w{i}" for i in range(4, 40)), "w5 w4", "w8 w8", ""]


def embed(prompts: list[str], function: Any, **settings: Any) -> Any:
    return embed_prompts(prompts, function, settings.pop("tokenizer", tokenizer()), progress=False, **settings)


# ---- embed_prompts ----


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batched_embeddings_are_those_of_single_unpadded_prompts(batch_size: int) -> None:
    encoder, tokens = Encoder(), tokenizer()
    found = embed(PROMPTS, encoder, batch_size=batch_size)
    assert found.dtype == np.float32
    for prompt, row in zip(PROMPTS, found, strict=True):
        ids = [1, *[int(word[1:]) for word in prompt.split()][: LIMIT - 2], 2]
        assert tokens(prompt, truncation=True)["input_ids"] == ids
        with torch.no_grad():
            alone = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert row == pytest.approx(alone.numpy(), abs=1e-5)


def test_each_different_prompt_is_embedded_once_longest_first_with_its_padding_masked() -> None:
    encoder = Encoder()
    embed(PROMPTS, encoder, batch_size=3)
    assert [ids.shape for ids, _ in encoder.calls] == [(3, 12), (3, 4)]
    lengths = [length for _, mask in encoder.calls for length in mask.sum(1).tolist()]
    assert lengths == [12, 6, 4, 4, 3, 2]
    for ids, mask in encoder.calls:
        assert torch.equal(mask, (ids != 0).long())
        assert ids.dtype == mask.dtype == torch.int64


def test_padding_is_on_the_side_that_the_tokenizer_wants() -> None:
    encoder, tokens = Encoder(), tokenizer()
    tokens.padding_side = "left"
    embed(["w4 w5", "w6"], encoder, tokenizer=tokens)
    ids, mask = encoder.calls[0]
    assert ids.tolist() == [[1, 4, 5, 2], [0, 1, 6, 2]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_order_of_prompts_does_not_matter() -> None:
    forward, backward = (embed(prompts, Encoder(), batch_size=2) for prompts in (PROMPTS, PROMPTS[::-1]))
    assert np.array_equal(forward, backward[::-1])


def test_no_gradient_is_kept_and_half_precision_and_numpy_are_accepted() -> None:
    seen = []

    def function(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
        result = Encoder(torch.bfloat16)(input_ids, attention_mask)
        seen.append((result.requires_grad, result.dtype))
        return result.float().numpy().astype(np.float64)

    from_numpy = embed(PROMPTS, function)
    assert seen == [(False, torch.bfloat16)]
    assert from_numpy.dtype == np.float32
    assert np.array_equal(from_numpy, embed(PROMPTS, Encoder(torch.bfloat16)))


def test_a_tokenizer_without_limit_or_pad_token_will_do() -> None:
    encoder, tokens = Encoder(), tokenizer()
    tokens.model_max_length = int(1e30)
    tokens.pad_token, tokens.eos_token = None, "[SEP]"
    found = embed(["w4 w5", "w6"], encoder, tokenizer=tokens)
    assert encoder.calls[0][1].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert found == pytest.approx(embed(["w4 w5", "w6"], Encoder()), abs=1e-5)


def hidden_states(input_ids: Any, attention_mask: Any) -> Any:
    return Encoder().model(input_ids=input_ids, attention_mask=attention_mask)


WANTED = r"it must return one embedding per prompt, a tensor of shape \[batch, dim\]"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (hidden_states, rf"^embedding_func returned a BaseModelOutput\w*: {WANTED}, such as the masked mean"),
        (lambda **inputs: hidden_states(**inputs).to_tuple(), rf"^embedding_func returned a tuple: {WANTED}"),
        (
            lambda **inputs: hidden_states(**inputs).last_hidden_state,
            rf"^embedding_func returned the shape \[2, 4, 16\] for 2 prompts: {WANTED}, such as the masked mean",
        ),
        (lambda input_ids, attention_mask: torch.ones(3, 5), r"^embedding_func returned the shape \[3, 5\] for 2 "),
        (lambda input_ids, attention_mask: torch.ones(2), r"^embedding_func returned the shape \[2\] for 2 prompts"),
        (
            lambda input_ids, attention_mask: torch.where(input_ids[:, :1] == 1, torch.tensor([[1.0], [torch.nan]]), 1),
            r"^embedding_func returned a value that is not finite for the prompt 'w6'$",
        ),
    ],
)
def test_a_wrong_result_says_what_to_return(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(["w6", "w4 w5"], function)


def test_embeddings_that_change_their_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^embedding_func returned 3 entries per prompt after 4: it must return one"):
        embed(["w6", "w4 w5"], lambda input_ids, attention_mask: input_ids.float(), batch_size=1)


def test_a_prompt_without_tokens_and_no_prompts_are_refused() -> None:
    tokens = tokenizer()
    tokens.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match=r"^the embedding_tokenizer makes no token of the prompt '': drop rows"):
        embed(["w4", ""], Encoder(), tokenizer=tokens)
    with pytest.raises(ValueError, match=r"^there are no prompts to embed$"):
        embed([], Encoder())


# ---- embed_counting ----


LONGEST = max(PROMPTS, key=len)


@pytest.mark.parametrize(
    ("limit", "truncated"),
    [(None, 1), (12, 1), (7, 1), (6, 1), (5, 2), (4, 2), (3, 4)],  # special tokens included
)
def test_different_prompts_that_were_cut_are_counted(limit: int | None, truncated: int) -> None:
    encoder = Encoder()
    found = embed_counting([*PROMPTS, LONGEST], encoder, tokenizer(), limit=limit, progress=False)
    assert found.truncated == truncated
    assert max(ids.shape[1] for ids, _ in encoder.calls) == (limit or LIMIT)
    assert found.values.shape == (9, 16)
    assert np.array_equal(found.values[4], found.values[8])


def test_what_fits_exactly_is_not_cut() -> None:
    exact, longer = (" ".join(["w4"] * count) for count in (LIMIT - 2, LIMIT - 1))
    assert embed_counting([exact], Encoder(), tokenizer(), progress=False).truncated == 0
    assert embed_counting([exact, longer], Encoder(), tokenizer(), progress=False).truncated == 1


def test_counting_changes_no_embedding() -> None:
    counted = embed_counting(PROMPTS, Encoder(), tokenizer(), batch_size=3, progress=False)
    assert np.array_equal(counted.values, embed(PROMPTS, Encoder(), batch_size=3))


def test_a_prompt_without_tokens_can_be_given_one() -> None:
    tokens, encoder = tokenizer(), Encoder()
    tokens.backend_tokenizer.post_processor = None
    embed_counting(["w4", ""], encoder, tokens, empty=2, progress=False)
    assert sorted(encoder.calls[0][0].flatten().tolist()) == [2, 4]


def test_a_tokenizer_without_a_limit_cuts_nothing() -> None:
    tokens = tokenizer()
    assert token_limit(tokens) == LIMIT
    tokens.model_max_length = int(1e30)
    assert token_limit(tokens) is None
    short = " ".join(["w4"] * 9)
    assert embed_counting([short, "w5"], Encoder(), tokens, progress=False).truncated == 0


def test_distinct_prompts_are_sorted_and_every_prompt_finds_its_own() -> None:
    unique, places = distinct(PROMPTS)
    assert unique == sorted(set(PROMPTS))
    assert [unique[place] for place in places] == PROMPTS


# ---- raw_prompt_text ----


def test_a_string_stands_for_itself() -> None:
    assert raw_prompt_text(" as it is\n") == " as it is\n"


def test_of_messages_the_user_text_counts() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Why?"},
    ]
    assert raw_prompt_text(messages) == "Hello\n\nWhy?"
    assert raw_prompt_text(messages[1:2]) == "Hello"
    assert raw_prompt_text(messages[:1]) == "Be brief."
