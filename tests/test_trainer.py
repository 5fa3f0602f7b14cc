"""BCOTrainer: values by hand, and what must not depend on how a step is cut or interrupted."""

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from bco_lab import BCOTrainer
from bco_lab.checkpoints import MARKER, last_whole_checkpoint
from bco_lab.logps import completion_logps

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def lora_trainer(folder: Path, train: Dataset, evaluation: Dataset | None = None, **settings: Any) -> BCOTrainer:
    return BCOTrainer(
        model=tiny.model(),
        args=tiny.config(folder, **settings),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(LORA),
    )


@pytest.mark.parametrize(("reduction", "first_loss"), [("class_balanced", 2 * math.log(2)), ("pooled", math.log(2))])
def test_first_loss_is_that_of_zero_rewards(tmp_path: Path, reduction: str, first_loss: float) -> None:
    trained = tiny.trainer(tmp_path, tiny.rows(16), loss_reduction=reduction, max_steps=1)
    trained.train()
    assert tiny.logged(trained, "loss")[0] == pytest.approx(first_loss, abs=1e-5)
    assert tiny.logged(trained, "delta") == [0.0]


@pytest.mark.parametrize("reduction", ["class_balanced", "pooled"])
@pytest.mark.parametrize("cut", [(4, 4), (1, 16), (5, 4)])
def test_micro_batches_do_not_matter(tmp_path: Path, reduction: str, cut: tuple[int, int]) -> None:
    # 40 rows: steps of 16, 16 and 8 rows whole, and of 20 for the cut (5, 4), which must match 1 x 20
    whole_batch = cut[0] * cut[1]
    settings: dict[str, Any] = {"loss_reduction": reduction, "max_steps": 4, "beta": 0.5}
    whole = tiny.trainer(tmp_path / "a", tiny.rows(40), per_device_train_batch_size=whole_batch, **settings)
    parts = tiny.trainer(
        tmp_path / "b",
        tiny.rows(40),
        per_device_train_batch_size=cut[0],
        gradient_accumulation_steps=cut[1],
        **settings,
    )
    start = tiny.weights(whole)
    whole.train()
    parts.train()
    moved = (tiny.weights(whole) - start).norm()
    assert moved > 1e-2
    assert (tiny.weights(whole) - tiny.weights(parts)).norm() / moved < 1e-5
    for key in ("loss", "delta", "rewards/chosen", "rewards/margins", "kl", "count/chosen"):
        assert tiny.logged(parts, key) == pytest.approx(tiny.logged(whole, key), abs=2e-6), key


def test_ema_delta_follows_from_the_logged_rewards(tmp_path: Path) -> None:
    trained = tiny.trainer(tmp_path, tiny.rows(24), max_steps=4, reward_shift_decay=0.75, beta=1.0)
    trained.train()
    up = down = 0.0
    for delta, chosen, rejected in zip(
        tiny.logged(trained, "delta"),
        tiny.logged(trained, "rewards/chosen"),
        tiny.logged(trained, "rewards/rejected"),
        strict=True,
    ):
        assert delta == pytest.approx((up + down) / 2, abs=1e-7)
        up, down = 0.75 * up + 0.25 * chosen, 0.75 * down + 0.25 * rejected
    assert trained.reward_shift.delta == pytest.approx((up + down) / 2, abs=1e-7)
    assert abs(trained.reward_shift.delta) > 1e-4


def test_trl_delta_is_the_mean_of_all_rewards_so_far_the_current_batch_included(tmp_path: Path) -> None:
    trained = tiny.trainer(tmp_path, tiny.rows(24), max_steps=3, reward_shift="trl", beta=1.0)
    trained.train()
    total = seen = 0.0
    for row in (row for row in trained.state.log_history if "loss" in row):
        total += row["rewards/chosen"] * row["count/chosen"] + row["rewards/rejected"] * row["count/rejected"]
        seen += row["count/chosen"] + row["count/rejected"]
        assert row["delta"] == pytest.approx(total / seen, abs=1e-6)
    assert abs(total / seen) > 1e-4


def test_zero_delta_stays_zero(tmp_path: Path) -> None:
    trained = tiny.trainer(tmp_path, tiny.rows(16), reward_shift="zero", beta=1.0)
    trained.train()
    assert tiny.logged(trained, "delta") == [0.0, 0.0, 0.0]


def test_one_sided_batches_train_and_leave_the_absent_mean_alone(tmp_path: Path) -> None:
    trained = tiny.trainer(tmp_path, tiny.rows(16, up_every=100), beta=1.0)  # row 0 alone is desirable
    trained.train()
    assert all(math.isfinite(loss) for loss in tiny.logged(trained, "loss"))
    counts = tiny.logged(trained, "count/chosen")
    assert sorted(counts) == [0.0, 0.0, 1.0] or sorted(counts) == [0.0, 1.0, 1.0]
    for count, chosen in zip(counts, tiny.logged(trained, "rewards/chosen"), strict=True):
        assert math.isnan(chosen) == (count == 0)


def test_the_step_is_the_gradient_of_the_written_loss(tmp_path: Path) -> None:
    """One SGD step against the formula, differentiated by autograd on a plain, unbatched computation."""
    data = tiny.rows(6, example_weight=[1.0, 0.5, 2.0, 1.0, 1.5, 0.25])
    trained = tiny.trainer(tmp_path, data, max_steps=1, per_device_train_batch_size=6, beta=0.7)
    reference = tiny.model()
    trained.train()
    terms: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        log_probs = reference(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        logps = log_probs[row["prompt_length"] - 1 :].sum()
        sign = 1 if row["label"] else -1
        terms[row["label"]].append(
            -row["example_weight"] * torch.nn.functional.logsigmoid(sign * 0.7 * (logps - logps.detach()))
        )
    loss = sum(torch.stack(kind).mean() for kind in terms.values())
    loss.backward()  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= 1e-2 * parameter.grad
    expected = torch.cat([p.detach().double().flatten() for p in reference.parameters()])
    start = torch.cat([p.detach().double().flatten() for p in tiny.model().parameters()])
    assert (tiny.weights(trained) - expected).norm() / (expected - start).norm() < 1e-5


def test_evaluation_before_training_is_exactly_zero_and_equals_the_reference(tmp_path: Path) -> None:
    for precompute in (True, False):
        untrained = tiny.trainer(tmp_path, tiny.rows(8), tiny.rows(13, seed=1), precompute_ref_log_probs=precompute)
        metrics = untrained.evaluate()
        assert metrics["eval_rewards/chosen"] == metrics["eval_rewards/rejected"] == metrics["eval_kl"] == 0.0
        assert metrics["eval_rewards/accuracies"] == metrics["eval_rewards/auc"] == 0.5
        assert metrics["eval_count/chosen"] + metrics["eval_count/rejected"] == 13
        assert metrics["eval_loss"] == pytest.approx(2 * math.log(2))
        if precompute:
            expected = {k: v for k, v in untrained.reference_metrics().items() if k in metrics}
            assert len(expected) > 10
            assert {key: metrics[key] for key in expected} == pytest.approx(expected)


def test_evaluation_does_not_depend_on_its_batch_size(tmp_path: Path) -> None:
    results = []
    for size in (1, 5, 13):
        trained = tiny.trainer(
            tmp_path / str(size), tiny.rows(16), tiny.rows(13, seed=1), beta=1.0, per_device_eval_batch_size=size
        )
        trained.train()
        results.append({k: v for k, v in trained.evaluate().items() if "rewards" in k or "loss" in k or "kl" in k})
    assert results[1] == pytest.approx(results[0], abs=1e-5)
    assert results[2] == pytest.approx(results[0], abs=1e-5)
    assert abs(results[0]["eval_kl"]) > 1e-3


@pytest.mark.parametrize("wrapped", [True, False], ids=["lora", "full"])
def test_reference_on_the_fly_equals_reference_ahead(tmp_path: Path, wrapped: bool) -> None:
    make = lora_trainer if wrapped else tiny.trainer
    losses = []
    for precompute in (True, False):
        trained = make(
            tmp_path / str(precompute), tiny.rows(16), precompute_ref_log_probs=precompute, beta=1.0, learning_rate=0.1
        )
        assert (trained.ref_model is None) == (precompute or wrapped)
        trained.train()
        losses.append(tiny.logged(trained, "loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0][2] - losses[0][0]) > 1e-4


def test_explicit_ref_model_is_used_and_left_alone(tmp_path: Path) -> None:
    other = tiny.model(seed=7)
    before = [p.clone() for p in other.parameters()]
    made = BCOTrainer(
        model=tiny.model(),
        ref_model=other,
        args=tiny.config(tmp_path, precompute_ref_log_probs=False, beta=1.0),
        train_dataset=tiny.rows(8),
        eval_dataset=tiny.rows(5, seed=1),
        processing_class=tiny.tokenizer(),
    )
    batch = made.data_collator([made.eval_dataset[i] for i in range(5)])
    expected = completion_logps(tiny.model(), batch).logps - completion_logps(tiny.model(seed=7), batch).logps
    assert made.predict(tiny.rows(5, seed=1)).predictions == pytest.approx(expected.detach().numpy(), abs=1e-5)
    made.train()
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert not any(p.requires_grad for p in other.parameters())


def test_rows_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    orders = []
    for seed in (0, 0, 1):
        made = tiny.trainer(tmp_path, tiny.rows(16), seed=seed)
        orders.append([int(i) for batch in made.get_train_dataloader() for i in batch["example_id"]])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == list(range(100, 116))


def test_resumed_run_ends_bit_identical(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "beta": 1.0,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "disable_dropout": False,
    }
    undisturbed = lora_trainer(tmp_path / "a", tiny.rows(20), **settings)
    undisturbed.train()
    interrupted = lora_trainer(tmp_path / "b", tiny.rows(20), **settings)
    interrupted.add_callback(StopAt(5))
    interrupted.train()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed = lora_trainer(tmp_path / "b", tiny.rows(20), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(tiny.weights(undisturbed), tiny.weights(resumed))
    assert undisturbed.reward_shift == resumed.reward_shift
    assert undisturbed.reward_shift.delta != 0
    assert tiny.logged(undisturbed, "loss")[5:] == tiny.logged(resumed, "loss")[5:]


def test_a_finished_run_resumes_into_more_epochs_and_no_further_without_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": -1, "save_strategy": "steps", "save_steps": 2}
    first = tiny.trainer(tmp_path, tiny.rows(16), num_train_epochs=1, **settings)
    first.train()
    assert first.state.global_step == 2
    again = tiny.trainer(tmp_path, tiny.rows(16), num_train_epochs=1, **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(tiny.weights(again), tiny.weights(first))
    longer = tiny.trainer(tmp_path, tiny.rows(16), num_train_epochs=2, **settings)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4
    assert not torch.equal(tiny.weights(longer), tiny.weights(first))


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    trained = tiny.trainer(tmp_path, tiny.rows(16), save_strategy="steps", save_steps=1, save_total_limit=2)
    trained.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    newest = tmp_path / "checkpoint-3"
    (newest / MARKER).rename(newest / "elsewhere")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (newest / "elsewhere").rename(newest / MARKER)
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-1])
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    again = tiny.trainer(tmp_path, tiny.rows(16), save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert torch.equal(tiny.weights(again), tiny.weights(trained))


def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in"):
        tiny.trainer(tmp_path, tiny.rows(8)).train(resume_from_checkpoint=True)


def test_save_only_model_keeps_delta(tmp_path: Path) -> None:
    trained = tiny.trainer(tmp_path, tiny.rows(16), save_strategy="steps", save_steps=3, save_only_model=True, beta=1.0)
    trained.train()
    state = (tmp_path / "checkpoint-3" / "reward_shift.json").read_text()
    assert repr(trained.reward_shift.desirable_mean) in state
    assert trained.reward_shift.desirable_mean != 0


def test_non_finite_reward_stops_before_the_update_and_names_the_example(tmp_path: Path) -> None:
    data = tiny.rows(8, ref_logps=[-20.0] * 5 + [math.inf] + [-20.0] * 2)
    made = tiny.trainer(tmp_path, data)
    start = tiny.weights(made)
    with pytest.raises(FloatingPointError, match=r"step 1: example_id=105 has reward -inf.*1 example\(s\) in all"):
        made.train()
    assert torch.equal(tiny.weights(made), start)


def test_saved_adapter_and_model_load_again(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    for make, load in ((lora_trainer, AutoPeftModelForCausalLM), (tiny.trainer, AutoModelForCausalLM)):
        folder = tmp_path / load.__name__
        (folder / "base").mkdir(parents=True)
        trained = make(folder, tiny.rows(8), learning_rate=0.1)
        tiny.model().save_pretrained(folder / "base")
        if hasattr(trained.model, "peft_config"):
            trained.model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        trained.train()
        trained.save_model(str(folder / "saved"))
        loaded = load.from_pretrained(str(folder / "saved"))
        batch = trained.data_collator([trained.train_dataset[i] for i in range(8)])
        with torch.no_grad():
            mine, theirs = (completion_logps(m.eval(), batch).logps for m in (trained.model, loaded))
            untrained = completion_logps(tiny.model(), batch).logps
        assert torch.equal(mine, theirs)
        assert (mine - untrained).abs().max() > 1e-3


def test_mixture_of_experts_adds_its_scaled_auxiliary_loss(tmp_path: Path) -> None:
    made = BCOTrainer(
        model=tiny.mixtral(output_router_logits=True, router_aux_loss_coef=0.25),
        args=tiny.config(tmp_path, max_steps=1),
        train_dataset=tiny.rows(8),
        eval_dataset=tiny.rows(8, seed=1),
        processing_class=tiny.tokenizer(),
    )
    untrained = made.evaluate()
    assert untrained["eval_loss"] == pytest.approx(2 * math.log(2) + 0.25 * untrained["eval_aux_loss"], abs=1e-5)
    made.train()
    aux_loss = tiny.logged(made, "aux_loss")[0]
    assert aux_loss > 1.0
    assert tiny.logged(made, "loss")[0] == pytest.approx(2 * math.log(2) + 0.25 * aux_loss, abs=1e-5)


def test_raw_rows_are_tokenised_and_p_desirable_becomes_the_clamped_ratio(tmp_path: Path) -> None:
    raw = Dataset.from_dict(
        {
            "prompt": ["w2 w3 "] * 4,
            "completion": ["w4 w5", "w6", "w7 w8 w9", "w4"],
            "label": [1, 0, 1, 0],
            "p_desirable": [0.9, 0.75, 0.2, 0.99],
        }
    )
    made = tiny.trainer(tmp_path, raw, max_density_ratio=5.0)
    assert made.train_dataset["input_ids"][0] == [2, 3, 4, 5, 1]
    assert made.train_dataset["prompt_length"] == [2, 2, 2, 2]
    assert made.train_dataset["example_weight"] == pytest.approx([1.0, 3.0, 1.0, 5.0])


def test_dict_of_evaluation_sets_gets_prefixed_metrics(tmp_path: Path) -> None:
    sets = {"one": tiny.rows(5, seed=1), "two": tiny.rows(7, seed=2)}
    metrics = tiny.trainer(tmp_path, tiny.rows(8), sets).evaluate()
    assert metrics["eval_one_count/chosen"] + metrics["eval_one_count/rejected"] == 5
    assert metrics["eval_two_count/chosen"] + metrics["eval_two_count/rejected"] == 7
    assert metrics["eval_two_rewards/auc"] == 0.5


def test_compute_metrics_receives_rewards_and_labels(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def compute(prediction: Any) -> dict[str, float]:
        seen["rewards"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"spread": float(prediction.predictions.max() - prediction.predictions.min())}

    made = BCOTrainer(
        model=tiny.model(),
        args=tiny.config(tmp_path, beta=1.0),
        train_dataset=tiny.rows(8),
        eval_dataset=tiny.rows(6, seed=1),
        processing_class=tiny.tokenizer(),
        compute_metrics=compute,
    )
    made.train()
    metrics = made.evaluate()
    assert seen["labels"].tolist() == [True, False, False, True, False, False]
    up = seen["rewards"][[0, 3]].mean()
    assert metrics["eval_rewards/chosen"] == pytest.approx(float(up), abs=1e-6)
    assert metrics["eval_spread"] > 0


def test_arguments_that_cannot_work_are_refused(tmp_path: Path) -> None:
    policy = tiny.model()
    with pytest.raises(ValueError, match="ref_model is the same object as model"):
        BCOTrainer(model=policy, ref_model=policy, args=tiny.config(tmp_path))
    with pytest.raises(ValueError, match="processing_class is needed"):
        BCOTrainer(model=policy, args=tiny.config(tmp_path), train_dataset=tiny.rows(4))
    with pytest.raises(ValueError, match="pass model, its name, or model_init"):
        BCOTrainer(args=tiny.config(tmp_path), train_dataset=tiny.rows(4))
    trained = tiny.trainer(tmp_path, tiny.rows(8))
    with pytest.raises(ValueError, match="no ref_logps and no reference model is left"):
        trained.evaluate(tiny.rows(4, seed=3))


class StopAt(TrainerCallback):
    """Ends training after a step, as if the process had gone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
