"""Small models, padded batches and slow, obviously right log-probs, for the tests of every room."""

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from bco_lab.data.collation import FeedbackCollator

NaiveLogps = Callable[[nn.Module, list[int], int], Tensor]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A two-layer Llama with random float32 weights, in eval mode."""
    return tiny.model().eval()


@pytest.fixture
def mixtral() -> MixtralForCausalLM:
    """A two-layer mixture of four experts with random float32 weights, in eval mode; it reports no auxiliary loss."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def feedback() -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    """Seven rows of 7 to 14 tokens with prompts of 2 to 4, and the padded batch made of them."""
    rows = list(tiny.rows(7))
    return rows, FeedbackCollator()(rows)


@pytest.fixture
def naive_logps() -> NaiveLogps:
    """Sum of completion log-probs of one row: alone, unpadded, all logits, one token after the other, float64."""

    def compute(model: nn.Module, input_ids: list[int], prompt_length: int) -> Tensor:
        logits = model(input_ids=torch.tensor([input_ids])).logits[0].double()
        total = torch.zeros((), dtype=torch.float64)
        for position in range(prompt_length, len(input_ids)):
            before = logits[position - 1]
            total = (
                total + before[input_ids[position]] - torch.log(torch.exp(before - before.max()).sum()) - before.max()
            )
        return total

    return compute
