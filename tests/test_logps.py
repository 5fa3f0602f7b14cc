import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from bco_lab import logps
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


# ---- encoder-decoders ----


def bart() -> nn.Module:
    """Its head adds a bias after the projection, which must not get lost."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=tiny.VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


def switch() -> Any:
    """A dense layer and one of four experts on each side, none of which drops a token for lack of room."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=tiny.VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=4,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=256,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config).eval()


ENCODER_DECODERS = pytest.mark.parametrize(
    "make",
    [tiny.t5, lambda: tiny.t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"), bart, switch],
    ids=["t5", "t5 untied", "bart", "switch"],
)


def alone(model: Any, row: dict[str, Any]) -> Tensor:
    """The completion's log-prob out of the full logits of the row on its own."""
    prompt, completion = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
    read = torch.tensor([[model.config.decoder_start_token_id, *completion[:-1]]])
    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[0].double()
    return logits.log_softmax(-1)[range(len(completion)), completion].sum()


@pytest.mark.parametrize("with_head", [True, False])
@ENCODER_DECODERS
def test_an_encoder_decoder_equals_each_row_alone(make: Callable[[], Any], with_head: bool) -> None:
    model = make().eval()
    start = model.config.decoder_start_token_id
    rows = list(tiny.rows(7))
    batch = FeedbackCollator(decoder_start_token_id=start)(rows)
    with torch.no_grad():
        result = completion_logps(model, batch, output_head(model) if with_head else None)
        expected = [alone(model, row).item() for row in rows]
    assert result.logps.tolist() == pytest.approx(expected, abs=1e-4)
    assert result.aux_loss is None
    assert result.token_counts.tolist() == [len(row["input_ids"]) - row["prompt_length"] for row in rows]


@ENCODER_DECODERS
def test_gradients_of_an_encoder_decoder_are_those_of_each_row_alone(make: Callable[[], Any]) -> None:
    model = make().eval()
    rows = list(tiny.rows(3))
    batch = FeedbackCollator(decoder_start_token_id=model.config.decoder_start_token_id)(rows)
    weights = torch.tensor([1.0, -2.0, 0.5])
    parameters = list(model.parameters())
    loss = (completion_logps(model, batch, output_head(model)).logps * weights).sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    loss = sum(alone(model, row) * weight for row, weight in zip(rows, weights, strict=True))
    expected = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    assert sum(gradient.abs().sum() for gradient in expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_head_of_an_encoder_decoder_sees_completion_positions_only() -> None:
    model, rows = tiny.t5().eval(), list(tiny.rows(5))
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    completion_logps(model, FeedbackCollator(decoder_start_token_id=0)(rows), output_head(model))
    completion_tokens = sum(len(row["input_ids"]) - row["prompt_length"] for row in rows)
    assert [tuple(hidden.shape) for hidden in seen] == [(1, completion_tokens, 32)]


def test_what_fills_the_padding_of_an_encoder_decoder_does_not_matter() -> None:
    model, rows = tiny.t5().eval(), list(tiny.rows(5))
    with torch.no_grad():
        one, other = (
            completion_logps(model, FeedbackCollator(pad_token_id=pad, decoder_start_token_id=0)(rows)).logps
            for pad in (0, 17)
        )
    assert torch.equal(one, other)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
def test_auxiliary_losses_of_encoder_and_decoder_are_added(wrap: Callable[[Any], Any]) -> None:
    model = switch()
    batch = FeedbackCollator(decoder_start_token_id=0)(list(tiny.rows(7)))
    read = {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")}
    outputs = model(**read, output_router_logits=True)
    expected = outputs.encoder_aux_loss + outputs.decoder_aux_loss
    model.config.output_router_logits = True
    found = completion_logps(wrap(model), batch, output_head(model)).aux_loss
    assert found is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for side in (model.encoder, model.decoder):
        router = next(module for name, module in side.named_modules() if name.endswith("router.classifier"))
        (gradient,) = torch.autograd.grad(found, [router.weight], retain_graph=True)
        assert gradient.abs().max() > 0


def test_a_side_without_experts_adds_nothing() -> None:
    model = switch()
    model.config.output_router_logits = True
    model.decoder.config.decoder_sparse_step = 1  # says 0, not a tensor
    batch = FeedbackCollator(decoder_start_token_id=0)(list(tiny.rows(7)))
    read = {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")}
    expected = model(**read, output_router_logits=True).encoder_aux_loss
    found = completion_logps(model, batch).aux_loss
    assert found is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


# ---- exactness ----


def test_bfloat16_weights_cost_less_than_a_thousandth_of_a_nat_per_token() -> None:
    narrow = tiny.model(max_position_embeddings=1024).to(torch.bfloat16).eval()
    wide = copy.deepcopy(narrow).float()
    ids = torch.randint(2, tiny.VOCABULARY, (800,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = FeedbackCollator()([{"input_ids": ids, "prompt_length": 100, "label": True, "example_id": 0}])
    with torch.no_grad():
        exact = completion_logps(wide, batch, output_head(wide)).logps.item()
        found = completion_logps(narrow, batch, output_head(narrow)).logps
        logits = narrow(input_ids=batch["input_ids"]).logits[0, 99:-1]
        carelessly = logits.log_softmax(-1).gather(1, batch["input_ids"][0, 100:, None]).sum().item()
    assert found.dtype == torch.float32
    assert abs(found.item() - exact) / 700 < 1e-3
    # what a sum in bfloat16 would have cost
    assert abs(carelessly - exact) / 700 > 1e-3


@pytest.mark.parametrize("elements_at_once", [1, 7 * 60, 2**24])
def test_token_logps_and_their_gradient_are_those_of_cross_entropy(
    elements_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logps, "_ELEMENTS_AT_ONCE", elements_at_once)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=draw, requires_grad=True)
    head = torch.randn(60, 8, generator=draw, requires_grad=True)
    targets = torch.randint(0, 60, (40,), generator=draw)
    weights = torch.randn(40, generator=draw)
    found = token_logps(hidden @ head.T * 10, targets)
    gradients = torch.autograd.grad((found * weights).sum(), (hidden, head))
    expected = -F.cross_entropy(hidden.double() @ head.double().T * 10, targets, reduction="none")
    exact = torch.autograd.grad((expected * weights).sum(), (hidden, head))
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-5)
    for one, other in zip(gradients, exact, strict=True):
        assert ((one - other).norm() / other.norm()).item() < 1e-6


def test_token_logps_are_finite_for_huge_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    found = token_logps(logits * 1.0, torch.tensor([1, 2]))
    assert found.tolist() == pytest.approx([-2e4, -math.log(3)])
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.tolist() == [pytest.approx(row) for row in ([-1.0, 1.0, 0.0], [-1 / 3, -1 / 3, 2 / 3])]


@pytest.mark.parametrize("make", [tiny.model, lambda: tiny.t5(tie_word_embeddings=False)], ids=["llama", "t5"])
def test_completions_are_scored_under_huge_logits(make: Callable[[], Any]) -> None:
    model, rows = make().eval(), list(tiny.rows(5))
    start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    batch = FeedbackCollator(decoder_start_token_id=start)(rows)
    read = {key: value for key, value in batch.items() if key.endswith("input_ids")}
    with torch.no_grad():
        model.lm_head.weight.mul_(2e4 / model(**read).logits.abs().max())
        assert model(**read).logits.abs().max() > 1e4
    found = completion_logps(model, batch, output_head(model)).logps
    assert found.min() < -1e4
    assert found.isfinite().all()
    gradients = torch.autograd.grad(found.sum(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_logits_that_somebody_else_needs_are_not_overwritten_in_silence() -> None:
    scores = torch.randn(5, 9, requires_grad=True)
    logits = scores.tanh()  # its backward pass reads its own result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_logps(logits, torch.zeros(5, dtype=torch.long)).sum().backward()
