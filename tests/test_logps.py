from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralForCausalLM

from bco_lab.data.collation import FeedbackCollator
from bco_lab.logps import completion_logps, only_positions, output_head, token_logps

Feedback = tuple[list[dict[str, Any]], dict[str, Tensor]]
NaiveLogps = Callable[[nn.Module, list[int], int], Tensor]


def naive_batch(naive_logps: NaiveLogps, model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    return torch.stack([naive_logps(model, row["input_ids"], row["prompt_length"]) for row in rows])


@pytest.fixture
def lora_on_the_head(llama: LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(1)
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["lm_head", "q_proj"], init_lora_weights=False
    )
    return get_peft_model(llama, adapter).eval()


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "lora_on_the_head"])
def test_equal_to_a_loop_over_the_tokens_of_each_row(
    architecture: str, with_head: bool, request: pytest.FixtureRequest, feedback: Feedback, naive_logps: NaiveLogps
) -> None:
    model = request.getfixturevalue(architecture)
    rows, batch = feedback
    with torch.no_grad():
        result = completion_logps(model, batch, output_head(model) if with_head else None)
        expected = naive_batch(naive_logps, model, rows)
    assert torch.allclose(result.logps.double(), expected, rtol=0, atol=1e-4)
    assert result.logps.dtype == torch.float32
    assert result.token_counts.tolist() == [len(row["input_ids"]) - row["prompt_length"] for row in rows]
    assert result.aux_loss is None


def test_an_adapter_on_the_head_changes_the_result(lora_on_the_head: Any, feedback: Feedback) -> None:
    # what makes the agreement above worth something
    with torch.no_grad():
        adapted = completion_logps(lora_on_the_head, feedback[1], output_head(lora_on_the_head)).logps
        with lora_on_the_head.disable_adapter():
            base = completion_logps(lora_on_the_head, feedback[1], output_head(lora_on_the_head)).logps
    assert (adapted - base).abs().min() > 0.01


@pytest.mark.parametrize("architecture", ["llama", "lora_on_the_head"])
def test_gradients_are_those_of_the_loop(
    architecture: str, request: pytest.FixtureRequest, feedback: Feedback, naive_logps: NaiveLogps
) -> None:
    model = request.getfixturevalue(architecture)
    rows, batch = feedback
    weights = torch.linspace(-1, 2, len(rows))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = (completion_logps(model, batch, output_head(model)).logps * weights).sum()
    gradients = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad((naive_batch(naive_logps, model, rows) * weights).sum(), parameters)
    assert sum(g.abs().sum() for g in expected) > 1
    for got, want in zip(gradients, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_row_scores_the_same_alone_and_in_a_batch(llama: LlamaForCausalLM, feedback: Feedback) -> None:
    rows, batch = feedback
    assert len({len(row["input_ids"]) for row in rows}) > 1
    with torch.no_grad():
        together = completion_logps(llama, batch, output_head(llama)).logps
        wide = completion_logps(llama, FeedbackCollator(pad_to_multiple_of=32)(rows), output_head(llama)).logps
        alone = [completion_logps(llama, FeedbackCollator()([row]), output_head(llama)).logps.item() for row in rows]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert wide.tolist() == pytest.approx(alone, abs=1e-5)


def test_what_fills_the_padding_does_not_matter(llama: LlamaForCausalLM, feedback: Feedback) -> None:
    rows, batch = feedback
    other = FeedbackCollator(pad_token_id=17)(rows)
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    with torch.no_grad():
        assert torch.equal(completion_logps(llama, batch).logps, completion_logps(llama, other).logps)


@pytest.mark.parametrize("with_head", [True, False])
def test_sums_are_accumulated_in_float32_under_bfloat16_weights(
    with_head: bool, llama: LlamaForCausalLM, feedback: Feedback
) -> None:
    _, batch = feedback
    model = llama.bfloat16()
    with torch.no_grad():
        logps = completion_logps(model, batch, output_head(model) if with_head else None).logps
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.dtype == torch.bfloat16

    def summed(dtype: torch.dtype) -> Tensor:
        values = logits[:, :-1].to(dtype).log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        return (values * batch["completion_mask"][:, 1:]).sum(dim=1)

    assert logps.dtype == torch.float32
    assert torch.allclose(logps.double(), summed(torch.float64), rtol=0, atol=2e-5)
    assert (summed(torch.bfloat16).double() - summed(torch.float64)).abs().max() > 1e-2


def test_the_head_sees_only_positions_that_predict_a_completion_token(
    llama: LlamaForCausalLM, feedback: Feedback
) -> None:
    rows, batch = feedback
    seen: list[Tensor] = []
    llama.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    completion_logps(llama, batch, output_head(llama))
    completion_tokens = sum(len(row["input_ids"]) - row["prompt_length"] for row in rows)
    assert [tuple(hidden.shape) for hidden in seen] == [(1, completion_tokens, 32)]
    completion_logps(llama, batch)
    assert tuple(seen[1].shape) == (*batch["input_ids"].shape, 32)
    # the last prompt token predicts the first completion token, and nothing is predicted from the last token
    first = [seen[1][0, t] for t in range(rows[0]["prompt_length"] - 1, len(rows[0]["input_ids"]) - 1)]
    assert torch.equal(seen[0][0, : len(first)], torch.stack(first))


def test_the_hook_is_gone_afterwards_also_after_an_error(llama: LlamaForCausalLM, feedback: Feedback) -> None:
    _, batch = feedback
    before = llama(input_ids=batch["input_ids"]).logits
    completion_logps(llama, batch, output_head(llama))
    with pytest.raises(IndexError):
        completion_logps(llama, {**batch, "input_ids": batch["input_ids"] + 1000}, output_head(llama))
    assert torch.equal(llama(input_ids=batch["input_ids"]).logits, before)


def test_only_positions_keeps_their_order_and_further_arguments() -> None:
    class Scaled(nn.Module):
        def forward(self, hidden: Tensor, factor: float) -> Tensor:
            return hidden * factor

    head, hidden = Scaled(), torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    with only_positions(head, mask):
        assert head(hidden, 10.0).tolist() == [[[20.0, 30.0], [40.0, 50.0], [60.0, 70.0]]]
    assert torch.equal(head(hidden, 1.0), hidden)


@pytest.mark.parametrize("with_head", [True, False])
def test_auxiliary_loss_of_a_mixture_of_experts(
    with_head: bool, mixtral: MixtralForCausalLM, feedback: Feedback
) -> None:
    _, batch = feedback
    expected = mixtral(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
    ).aux_loss
    mixtral.config.output_router_logits = True
    aux_loss = completion_logps(mixtral, batch, output_head(mixtral) if with_head else None).aux_loss
    assert aux_loss is not None
    assert aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert aux_loss.item() == pytest.approx(2.0, abs=0.2)  # experts per token, where the load is even
    (gradient,) = torch.autograd.grad(aux_loss, [mixtral.model.layers[0].mlp.gate.weight])
    assert gradient.abs().max() > 0


def test_rows_without_a_completion_score_zero(llama: LlamaForCausalLM, feedback: Feedback) -> None:
    rows, _ = feedback
    empty = {**rows[0], "prompt_length": len(rows[0]["input_ids"])}
    with torch.no_grad():
        result = completion_logps(llama, FeedbackCollator()([empty, rows[1]]), output_head(llama))
        alone = completion_logps(llama, FeedbackCollator()([rows[1]]), output_head(llama)).logps.item()
        nothing = completion_logps(llama, FeedbackCollator()([empty]), output_head(llama))
    assert result.logps.tolist() == pytest.approx([0.0, alone], abs=1e-5)
    assert nothing.logps.tolist() == [0.0]
    assert nothing.token_counts.tolist() == [0]


def test_token_logps_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0]]).log_softmax(-1)
    assert token_logps(logits, torch.tensor([2, 0])).tolist() == pytest.approx([-1.3862944, 0.0], abs=1e-6)
    assert token_logps(logits.bfloat16(), torch.tensor([2, 1])).dtype == torch.float32


def test_output_head_is_the_module_that_makes_logits(llama: LlamaForCausalLM, lora_on_the_head: Any) -> None:
    assert output_head(lora_on_the_head) is lora_on_the_head.base_model.model.lm_head
    assert output_head(nn.Linear(2, 2)) is None
