import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from bco_lab.data.collation import FeedbackCollator
from bco_lab.logps import completion_logps
from bco_lab.reference import REF_LOGPS, add_ref_logps, reference_mode

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
NaiveLogps = Callable[[nn.Module, list[int], int], Tensor]


def adapter() -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )


@pytest.fixture
def policy(llama: LlamaForCausalLM) -> PeftModel:
    """The Llama with an adapter that changes its answers, in train mode."""
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(llama), adapter()).train()


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def trainable(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def reference_column(dataset: Dataset, model: nn.Module, **options: Any) -> Dataset:
    settings: dict[str, Any] = {"batch_size": 3, "by_length": True, "device": CPU}
    return add_ref_logps(dataset, model, FeedbackCollator(), **settings | options)


# ---- reference_mode ----


def test_a_policy_with_its_adapter_off_is_the_base_model(llama: LlamaForCausalLM, policy: PeftModel) -> None:
    with reference_mode(policy) as reference:
        assert torch.equal(logits(reference), logits(llama))
        assert not logits(reference).requires_grad
    policy.eval()
    assert (logits(policy) - logits(llama)).abs().max() > 0.01


def test_an_adapter_that_transformers_added_is_off_as_well(llama: LlamaForCausalLM) -> None:
    policy = copy.deepcopy(llama)
    torch.manual_seed(1)
    policy.add_adapter(adapter())
    policy.eval()
    assert (logits(policy) - logits(llama)).abs().max() > 0.01
    adapted = logits(policy)
    with reference_mode(policy) as reference:
        assert torch.equal(logits(reference), logits(llama))
    assert torch.equal(logits(policy), adapted)


@pytest.mark.parametrize("name", [None, "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_put_back_also_after_an_error(policy: PeftModel, training: bool, name: str | None) -> None:
    policy.add_adapter("frozen", adapter())
    policy.train(training)
    for parameter_name, parameter in policy.named_parameters():
        if "layers.0" in parameter_name:  # somebody trains the first layer's adapter only
            parameter.requires_grad_("frozen" not in parameter_name and "lora_A" in parameter_name)
    before = trainable(policy), modes(policy), policy.active_adapter, policy.active_adapters
    assert len({*before[0].values()}) == 2

    def fail() -> None:
        with reference_mode(policy, name):
            assert not policy.training
            raise KeyboardInterrupt

    policy.eval()
    answers = logits(policy)
    policy.train(training)
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (trainable(policy), modes(policy), policy.active_adapter, policy.active_adapters) == before
    assert torch.is_grad_enabled()
    policy.eval()
    assert torch.equal(logits(policy), answers)


def test_a_module_that_was_kept_in_eval_mode_stays_there(llama: LlamaForCausalLM) -> None:
    llama.train()
    llama.model.embed_tokens.eval()
    before = modes(llama)
    with reference_mode(llama):
        pass
    assert modes(llama) == before


def test_a_named_adapter_is_the_reference(llama: LlamaForCausalLM, policy: PeftModel) -> None:
    policy.add_adapter("sft", adapter())
    policy.set_adapter("sft")
    policy.eval()
    expected = logits(policy)
    policy.set_adapter("default")
    policy.train()
    with reference_mode(policy, "sft") as reference:
        assert torch.equal(logits(reference), expected)
    assert policy.active_adapter == "default"
    policy.eval()
    for other in (logits(policy), logits(llama)):
        assert (other - expected).abs().max() > 0.01


def test_a_plain_model_answers_as_it_stands_without_dropout(llama: LlamaForCausalLM) -> None:
    expected = logits(llama)
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    llama.train()
    with reference_mode(llama) as reference:
        assert reference is llama
        assert torch.equal(logits(reference), expected)
        assert not logits(reference).requires_grad
    assert llama.training
    assert all(trainable(llama).values())
    assert logits(llama).requires_grad


def test_an_adapter_that_is_not_there_is_an_error_that_changes_nothing(policy: PeftModel) -> None:
    before = trainable(policy), modes(policy), policy.active_adapter
    with pytest.raises(ValueError, match="nobody"), reference_mode(policy, "nobody"):
        pass
    assert (trainable(policy), modes(policy), policy.active_adapter) == before


# ---- add_ref_logps ----


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_column_is_that_of_a_loop_over_rows_in_their_order(
    by_length: bool, batch_size: int, llama: LlamaForCausalLM, naive_logps: NaiveLogps
) -> None:
    dataset = tiny.rows(7)
    result = reference_column(dataset, llama, by_length=by_length, batch_size=batch_size)
    with torch.no_grad():
        expected = [naive_logps(llama, row["input_ids"], row["prompt_length"]).item() for row in dataset]
    assert result[REF_LOGPS] == pytest.approx(expected, abs=1e-4)
    assert result["example_id"] == dataset["example_id"]
    assert result.column_names == [*dataset.column_names, REF_LOGPS]
    assert result[REF_LOGPS] == torch.tensor(result[REF_LOGPS]).tolist()  # float32, as batches will hold it


def test_the_policy_is_its_own_reference_with_its_adapter_off(llama: LlamaForCausalLM, policy: PeftModel) -> None:
    assert reference_column(tiny.rows(7), policy)[REF_LOGPS] == reference_column(tiny.rows(7), llama)[REF_LOGPS]
    assert policy.training
    policy.add_adapter("sft", adapter())
    column = reference_column(tiny.rows(7), policy, ref_adapter_name="sft")[REF_LOGPS]
    policy.set_adapter("sft")
    policy.eval()
    with torch.no_grad():
        expected = completion_logps(policy, FeedbackCollator()(list(tiny.rows(7)))).logps.tolist()
    assert column == pytest.approx(expected, abs=1e-5)


def test_rows_of_like_length_share_a_batch_if_asked(llama: LlamaForCausalLM) -> None:
    dataset, lengths = tiny.rows(7), []

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths.append([len(row["input_ids"]) for row in rows])
        return FeedbackCollator()(rows)

    own = [len(ids) for ids in dataset["input_ids"]]
    for by_length, order in ((True, sorted(own, reverse=True)), (False, own)):
        lengths.clear()
        add_ref_logps(dataset, llama, collate, batch_size=3, by_length=by_length, device=CPU)
        assert lengths == [order[:3], order[3:6], order[6:]]
    assert own != sorted(own, reverse=True)


@pytest.mark.parametrize(("rows", "batch_size"), [(7, 2), (7, 3), (5, 2), (2, 2)])
def test_two_processes_share_the_work_and_agree_with_one(rows: int, batch_size: int, llama: LlamaForCausalLM) -> None:
    dataset, barrier = tiny.rows(rows), Barrier(2, timeout=30)
    models = [llama, copy.deepcopy(llama)]
    parts: dict[int, Tensor] = {}

    def process(index: int) -> list[float]:
        def gather(own: Tensor) -> Tensor:
            parts[index] = own
            barrier.wait()
            return torch.cat([parts[0], parts[1]])

        options = {"process_index": index, "num_processes": 2, "gather": gather, "batch_size": batch_size}
        return list(reference_column(dataset, models[index], **options)[REF_LOGPS])

    with ThreadPoolExecutor(2) as pool:
        columns = list(pool.map(process, range(2)))
    assert columns[0] == columns[1] == list(reference_column(dataset, llama, batch_size=batch_size)[REF_LOGPS])
    scored = [part[:, 0].long().tolist() for part in (parts[0], parts[1])]
    assert sorted(scored[0] + scored[1]) == list(range(rows))
    batches = math.ceil(rows / batch_size)
    assert [math.ceil(len(part) / batch_size) for part in scored] == [(batches + 1) // 2, batches // 2]


def test_mixed_precision_is_that_of_the_training_step(llama: LlamaForCausalLM) -> None:
    dataset = tiny.rows(7)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    column = reference_column(dataset, llama, batch_size=7, by_length=False, autocast=autocast)[REF_LOGPS]
    with torch.no_grad(), autocast():
        expected = completion_logps(llama, FeedbackCollator()(list(dataset)), llama.lm_head).logps.tolist()
    assert column == expected
    assert column != reference_column(dataset, llama, batch_size=7, by_length=False)[REF_LOGPS]


@pytest.mark.parametrize("by_length", [True, False])
def test_a_value_that_is_not_finite_names_the_example(by_length: bool, llama: LlamaForCausalLM) -> None:
    dataset = tiny.rows(7)
    rare = next(token for token in dataset[4]["input_ids"] if sum(token in ids for ids in dataset["input_ids"]) == 1)
    with torch.no_grad():
        llama.model.embed_tokens.weight[rare] = float("inf")
    message = r"^reference log-prob of example_id=104 is nan: it must be finite$"
    with pytest.raises(ValueError, match=message):
        reference_column(dataset, llama, by_length=by_length)
    rest = reference_column(dataset.select([0, 1, 2, 3, 5, 6]), llama, by_length=by_length)
    assert all(math.isfinite(value) for value in rest[REF_LOGPS])


def test_a_sum_that_overflows_is_named_too(llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        llama.model.norm.weight.fill_(5e37)  # each token's log-prob fits into float32, their sum does not
        llama.lm_head.weight.mul_(5)
    with pytest.raises(ValueError, match=r"^reference log-prob of example_id=100 is -inf: it must be finite$"):
        reference_column(tiny.rows(3), llama)
