"""Every argument of BCOTrainer does what it says: where model, reference, rows and tokenizer may come from."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import ProcessorMixin, TrainerCallback

from bco_lab import BCOConfig, BCOTrainer
from bco_lab.logps import completion_logps

PAIRS = {
    "prompt": ["w2 w3 ", "w4 w5 ", "w6 ", "w7 w8 "],
    "chosen": ["w9 w10", "w11", "w12 w13", "w14"],
    "rejected": ["w15", "w16 w17", "w18", "w19 w20"],
}


def fresh() -> Any:
    return tiny.model()


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


def made(folder: Path, *, settings: dict[str, Any] | None = None, **arguments: Any) -> BCOTrainer:
    defaults: dict[str, Any] = {"train_dataset": tiny.rows(16), "processing_class": tiny.tokenizer()}
    if "model_init" not in arguments:
        defaults["model"] = tiny.model()
    return BCOTrainer(args=tiny.config(folder, **(settings or {})), **{**defaults, **arguments})


# ---- where the model comes from ----


@pytest.fixture
def saved_model(tmp_path: Path) -> str:
    folder = tmp_path / "saved"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_model_by_name_brings_its_tokenizer_and_the_asked_dtype(tmp_path: Path, saved_model: str) -> None:
    data = Dataset.from_dict({"prompt": ["w2 ", "w3 "], "completion": ["w4", "w5 w6"], "label": [True, False]})
    for dtype in ("bfloat16", torch.bfloat16):
        trainer = BCOTrainer(
            model=saved_model,
            ref_model=saved_model,
            args=tiny.config(tmp_path, model_init_kwargs={"dtype": dtype}, precompute_ref_log_probs=False),
            train_dataset=data,
        )
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in trainer.ref_model.parameters()} == {torch.bfloat16}
        assert trainer.train_dataset["input_ids"][1] == [3, 5, 6, 1]
        trainer.train()
        assert trainer.state.global_step == 3


def test_model_init_is_called_anew_for_each_training(tmp_path: Path) -> None:
    trainer = made(tmp_path, model=None, model_init=fresh, settings={"beta": 1.0, "learning_rate": 0.1})
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append((tiny.weights(trainer), trainer.reward_shift, tiny.logged(trainer, "loss")))
    start = torch.cat([p.detach().double().flatten() for p in tiny.model().parameters()])
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0], start)
    assert runs[0][1:] == runs[1][1:]
    assert trainer.reward_shift.delta != 0


def test_model_init_gets_its_adapter_and_resumes(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "beta": 1.0, "optim": "adamw_torch"}
    first = made(tmp_path, model=None, model_init=fresh, peft_config=lora(), settings=settings)
    first.train()
    again = made(tmp_path, model=None, model_init=fresh, peft_config=lora(), settings=settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(tiny.weights(first), tiny.weights(again))
    assert first.reward_shift == again.reward_shift


# ---- the reference ----


def test_an_explicit_reference_is_freed_once_its_log_probs_are_a_column(tmp_path: Path) -> None:
    data = tiny.rows(8)
    trainer = made(tmp_path, ref_model=tiny.model(seed=7), train_dataset=data, eval_dataset=tiny.rows(5, seed=1))
    assert trainer.ref_model is None
    batch = trainer.data_collator([data[i] for i in range(8)])
    expected = completion_logps(tiny.model(seed=7), batch).logps
    assert trainer.train_dataset["ref_logps"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert "ref_logps" in trainer.eval_dataset.column_names


def test_rows_that_come_after_an_explicit_reference_is_gone_are_refused(tmp_path: Path) -> None:
    """The bare base model is there, but it is another reference than the one that was passed."""
    trainer = made(tmp_path, ref_model=tiny.model(seed=7), peft_config=lora(), eval_dataset=tiny.rows(4, seed=1))
    assert trainer.evaluate()["eval_kl"] != 0
    with pytest.raises(ValueError, match="no ref_logps and no reference model is left"):
        trainer.evaluate(tiny.rows(4, seed=3))


def two_adapters() -> Any:
    """A policy adapter `policy` and a reference adapter `reference`, both away from zero and different."""
    model = get_peft_model(tiny.model(), lora(), adapter_name="policy")
    model.add_adapter("reference", lora())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.mark.parametrize("precompute", [True, False])
def test_a_named_adapter_is_the_reference_and_never_trains(tmp_path: Path, precompute: bool) -> None:
    model = two_adapters()
    model.set_adapter("reference")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = made(
        tmp_path,
        model=model,
        model_adapter_name="policy",
        ref_adapter_name="reference",
        eval_dataset=tiny.rows(6, seed=1),
        settings={"precompute_ref_log_probs": precompute, "learning_rate": 0.1, "beta": 1.0},
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        policy = completion_logps(model.eval(), batch).logps
        model.set_adapter("reference")
        reference = completion_logps(model, batch).logps
        model.set_adapter("policy")
    rewards = trainer.predict(tiny.rows(16).select(range(8))).predictions
    assert rewards == pytest.approx((policy - reference).numpy(), abs=1e-4)
    assert np.abs(rewards).max() > 0.1
    trainer.train()
    assert model.active_adapter == "policy"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in before if ".policy." in n}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(".policy." in name for name in moved)


def test_lora_learns_with_gradient_checkpointing(tmp_path: Path) -> None:
    losses = []
    for checkpointing in (True, False):
        trainer = made(
            tmp_path,
            peft_config=lora(),
            settings={"gradient_checkpointing": checkpointing, "learning_rate": 0.1, "beta": 1.0},
        )
        trainer.train()
        losses.append(tiny.logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert abs(losses[0][2] - losses[0][0]) > 1e-4


# ---- rows ----


def test_pairs_become_two_rows_each(tmp_path: Path) -> None:
    trainer = made(tmp_path, train_dataset=Dataset.from_dict(PAIRS), eval_dataset=Dataset.from_dict(PAIRS))
    rows = trainer.train_dataset
    assert rows["label"] == [True, False] * 4
    assert rows["input_ids"][:2] == [[2, 3, 9, 10, 1], [2, 3, 15, 1]]
    assert trainer.evaluate()["eval_count/chosen"] == 4.0
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_stream_trains_and_evaluates_like_the_same_rows_in_memory(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "precompute_ref_log_probs": False,
        "train_sampling_strategy": "sequential",
        "beta": 1.0,
        "learning_rate": 0.1,
    }
    results = []
    for streamed in (True, False):
        train, held_out = tiny.rows(24), tiny.rows(13, seed=1)
        trainer = made(
            tmp_path,
            train_dataset=train.to_iterable_dataset() if streamed else train,
            eval_dataset=held_out.to_iterable_dataset() if streamed else held_out,
            settings=settings,
        )
        assert isinstance(trainer.train_dataset, IterableDataset) == streamed
        trainer.train()
        metrics = trainer.evaluate()
        results.append(tiny.logged(trainer, "loss") + [v for k, v in sorted(metrics.items()) if "rewards" in k])
        assert metrics["eval_count/chosen"] + metrics["eval_count/rejected"] == 13
    assert results[0] == pytest.approx(results[1], abs=1e-6)


def test_a_stream_read_by_workers_counts_each_row_once(tmp_path: Path) -> None:
    held_out = tiny.rows(13, seed=1).remove_columns("example_id").to_iterable_dataset(num_shards=2)
    trainer = made(
        tmp_path,
        eval_dataset=held_out,
        settings={"precompute_ref_log_probs": False, "dataloader_num_workers": 2},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_count/chosen"] + metrics["eval_count/rejected"] == 13


# ---- tokenizer ----


class Speaker(ProcessorMixin):
    """A processor with nothing but a tokenizer inside."""

    def __init__(self, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)


def test_a_processor_with_a_tokenizer_inside_serves(tmp_path: Path) -> None:
    processor = Speaker(tiny.tokenizer())
    trainer = made(tmp_path, train_dataset=Dataset.from_dict(PAIRS), processing_class=processor)
    assert trainer.train_dataset["input_ids"][0] == [2, 3, 9, 10, 1]
    assert trainer.processing_class is processor
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "tokenizer.json").is_file()


# ---- what the Trainer takes besides ----


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)


def test_callbacks_optimizers_and_metric_functions_are_used(tmp_path: Path) -> None:
    model, steps = tiny.model(), Steps()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = made(
        tmp_path,
        model=model,
        eval_dataset=tiny.rows(6, seed=1),
        callbacks=[steps],
        optimizers=(optimizer, schedule),
        preprocess_logits_for_metrics=lambda rewards, labels: rewards * 10 + labels,
        compute_metrics=lambda prediction: {"first": float(prediction.predictions[0])},
        settings={"eval_strategy": "steps", "eval_steps": 1, "beta": 1.0, "precompute_ref_log_probs": False},
    )
    trainer.train(trial=None, ignore_keys_for_eval=["logits"])
    assert steps.seen == [1, 2, 3]
    assert tiny.logged(trainer, "learning_rate") == [0.5, 0.25, 0.125]
    evaluations = [row for row in trainer.state.log_history if "eval_first" in row]
    assert [row["step"] for row in evaluations] == [1, 2, 3]
    reward = trainer.predict(tiny.rows(6, seed=1)).predictions[0]
    assert trainer.evaluate()["eval_first"] == pytest.approx(float(reward), abs=1e-6)


def test_arguments_may_be_left_to_their_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = BCOTrainer(model=tiny.model(), train_dataset=tiny.rows(4), processing_class=tiny.tokenizer())
    assert isinstance(trainer.args, BCOConfig)
    assert trainer.args.beta == 0.1
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert math.isclose(trainer.evaluate(tiny.rows(4))["eval_loss"], 2 * math.log(2), rel_tol=1e-6)


# ---- contradictions ----


def embed(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(input_ids), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": tiny.model(), "model_init": fresh}, "pass model, its name, or model_init: exactly one"),
        ({"model": None, "model_init": fresh, "optimizers": (object(), None)}, "optimizers and model_init excl"),
        ({"settings": {"model_init_kwargs": {"dtype": "auto"}}}, "model_init_kwargs is for a model or ref_model given"),
        ({"embedding_func": embed}, "embedding_func and embedding_tokenizer belong together"),
        ({"embedding_tokenizer": tiny.tokenizer()}, "embedding_func and embedding_tokenizer belong together"),
        ({"ref_adapter_name": "default"}, "ref_adapter_name=default is the adapter that trains"),
        ({"ref_adapter_name": "old"}, "ref_adapter_name=old: the model has none"),
        (
            {"ref_adapter_name": "old", "peft_config": lora()},
            "ref_adapter_name=old: the model has the adapters default",
        ),
        ({"ref_adapter_name": "old", "ref_model": tiny.model(1)}, "ref_adapter_name=old and ref_model are two ref"),
        ({"model_adapter_name": "new"}, "model_adapter_name=new: the model has none"),
        ({"settings": {"is_encoder_decoder": True}}, "is_encoder_decoder=True, but the model is a LlamaConfig"),
        ({"train_dataset": DatasetDict(train=tiny.rows(4))}, r"train_dataset is a dict of splits \('train'\)"),
        ({"train_dataset": [{"prompt": "w2"}]}, "train_dataset is a list, not a datasets.Dataset"),
        ({"processing_class": object()}, "processing_class=object neither is nor has a tokenizer"),
        ({"model": "./nowhere", "processing_class": None}, "model folder ./nowhere does not exist"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        made(tmp_path, **arguments)


def test_an_adapter_config_must_be_one_and_must_be_the_only_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="peft_config is a dict, not a PeftConfig such as LoraConfig"):
        made(tmp_path, peft_config={"r": 4})
    with pytest.raises(ValueError, match="peft_config with a model that is a PeftModel"):
        made(tmp_path, model=get_peft_model(tiny.model(), lora()), peft_config=lora())


def test_a_dtype_that_torch_does_not_have_is_refused(tmp_path: Path, saved_model: str) -> None:
    with pytest.raises(ValueError, match=r"model_init_kwargs\.dtype='float31' must be 'auto' or name a torch.dtype"):
        made(tmp_path, model=saved_model, settings={"model_init_kwargs": {"dtype": "float31"}})


# ---- underlying distribution matching ----


def two_prompt_families(count: int) -> Dataset:
    """Prompts of two kinds; thumbs-up come mostly from one, thumbs-down mostly from the other."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        up = bool(draw.random() < 0.5)
        first_kind = bool(draw.random() < (0.8 if up else 0.2))
        words = draw.integers(2, 20, 3) if first_kind else draw.integers(30, 48, 3)
        prompt = " ".join(f"w{word}" for word in words)
        rows.append({"prompt": prompt + " ", "completion": f"w{draw.integers(50, 60)}", "label": up})
    return Dataset.from_list(rows)


def word_kinds(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`[batch, 2]`: share of small and of large words in a prompt, padding left out."""
    small = ((input_ids < 20) & (attention_mask == 1)).float().sum(dim=1)
    large = ((input_ids >= 30) & (attention_mask == 1)).float().sum(dim=1)
    return torch.stack([small, large], dim=1) / attention_mask.sum(dim=1, keepdim=True)


def test_an_embedding_function_weights_undesirable_rows_by_their_prompts(tmp_path: Path) -> None:
    data = two_prompt_families(400)
    trainer = made(
        tmp_path,
        train_dataset=data,
        eval_dataset={"same": data.select(range(40)), "other": two_prompt_families(10)},
        embedding_func=word_kinds,
        embedding_tokenizer=tiny.tokenizer(),
        settings={"max_density_ratio": 8.0, "min_density_ratio": 0.1, "precompute_ref_log_probs": False},
    )
    weights = np.array(trainer.train_dataset["example_weight"])
    up = np.array(data["label"])
    first_kind = np.array([prompt.startswith(tuple(f"w{i} " for i in range(2, 20))) for prompt in data["prompt"]])
    assert set(weights[up]) == {1.0}
    for kind in (first_kind, ~first_kind):  # the ratio of the densities: about 0.8 / 0.2 and 0.2 / 0.8
        assert weights[~up & kind].mean() == pytest.approx(kind[up].mean() / kind[~up].mean(), rel=0.15)
    assert weights[~up].mean() == pytest.approx(1, abs=0.15)
    # a prompt that was trained on keeps its weight in every other set
    assert trainer.eval_dataset["same"]["example_weight"] == pytest.approx(weights[:40].tolist())
    trainer.train()
    log = next(row for row in trainer.state.log_history if "udm/weight_mean" in row)
    assert 0.1 < log["udm/weight_mean"] < 8
    raw = trainer.predict(data.select(range(40)))
    assert raw.metrics["test_udm/weight_mean"] == pytest.approx(weights[:40][~up[:40]].mean())
    assert trainer.matching.fit.diagnostics.auc > 0.7
    late = trainer.evaluate({"late": data.select(range(40)), "prepared": tiny.rows(4)})
    assert late["eval_late_udm/weight_mean"] == raw.metrics["test_udm/weight_mean"]
    assert late["eval_prepared_udm/weight_mean"] == 1.0


def test_a_stream_cannot_be_matched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train: a stream cannot be matched, because all prompts must be seen before"):
        made(
            tmp_path,
            train_dataset=two_prompt_families(10).to_iterable_dataset(),
            embedding_func=word_kinds,
            embedding_tokenizer=tiny.tokenizer(),
        )
