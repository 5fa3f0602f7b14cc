"""Encoder-decoders and mixtures of experts, trained."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSeq2SeqLM

from bco_lab import BCOTrainer
from bco_lab.logps import completion_logps

TEXT = Dataset.from_dict(
    {
        "prompt": [f"w{2 + i} w{3 + i}" for i in range(16)],
        "completion": [f"w{20 + i % 5} w{30 + i % 7}" if i % 2 else f"w{45 + i % 5}" for i in range(16)],
        "label": [bool(i % 2) for i in range(16)],
    }
)


def t5_trainer(folder: Path, *, settings: dict[str, Any] | None = None, **arguments: Any) -> BCOTrainer:
    defaults: dict[str, Any] = {
        "model": tiny.t5(),
        "train_dataset": TEXT,
        "eval_dataset": TEXT,
        "processing_class": tiny.t5_tokenizer(),
    }
    asked = {"beta": 1.0, "max_steps": 20, "optim": "adamw_torch", "learning_rate": 3e-3, **(settings or {})}
    return BCOTrainer(args=tiny.config(folder, **asked), **{**defaults, **arguments})


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_t5_learns_from_the_reference_on(tmp_path: Path, adapter: bool, precompute: bool) -> None:
    lora = LoraConfig(r=8, target_modules=["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    trained = t5_trainer(
        tmp_path,
        peft_config=lora if adapter else None,
        settings={"precompute_ref_log_probs": precompute, "learning_rate": 2e-2 if adapter else 3e-3},
    )
    assert trained.train_dataset[0]["input_ids"] == [2, 3, 1, 45, 1]
    assert trained.train_dataset[0]["prompt_length"] == 3
    before = trained.evaluate()
    assert before["eval_rewards/chosen"] == before["eval_rewards/rejected"] == 0.0
    trained.train()
    losses = tiny.logged(trained, "loss")
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    after = trained.evaluate()
    assert after["eval_rewards/auc"] > 0.95
    assert after["eval_logps/chosen"] > before["eval_logps/chosen"] + 0.5


def test_a_saved_t5_loads_again_also_by_name(tmp_path: Path) -> None:
    trained = t5_trainer(tmp_path / "run", settings={"max_steps": 3, "learning_rate": 1e-2})
    trained.train()
    trained.save_model(str(tmp_path / "saved"))
    batch = trained.data_collator([trained.train_dataset[i] for i in range(16)])
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved").eval()
    mine = completion_logps(trained.model.eval(), batch).logps
    assert completion_logps(loaded, batch).logps.tolist() == mine.tolist()
    again = t5_trainer(tmp_path / "again", model=str(tmp_path / "saved"), processing_class=None)
    assert again.is_encoder_decoder
    assert again.train_dataset["ref_logps"] == pytest.approx(mine.tolist(), abs=1e-4)


def test_pairs_and_gradient_accumulation_serve_t5_too(tmp_path: Path) -> None:
    pairs = Dataset.from_dict({"prompt": ["w2 w3"] * 8, "chosen": ["w9 w10"] * 8, "rejected": ["w15"] * 8})
    results = []
    for size, accumulation in ((16, 1), (4, 4)):
        trained = t5_trainer(
            tmp_path / str(size),
            train_dataset=pairs,
            settings={
                "max_steps": 2,
                "optim": "sgd",
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": accumulation,
            },
        )
        trained.train()
        results.append(tiny.logged(trained, "loss"))
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert results[0][1] < results[0][0]


def test_the_decoder_of_a_mixture_of_experts_reports_its_auxiliary_loss(tmp_path: Path) -> None:
    trained = BCOTrainer(
        model=tiny.mixtral(output_router_logits=True, router_aux_loss_coef=0.1),
        args=tiny.config(tmp_path, max_steps=20, optim="adamw_torch", learning_rate=3e-3, beta=1.0),
        train_dataset=tiny.rows(16),
        processing_class=tiny.tokenizer(),
    )
    trained.train()
    losses = tiny.logged(trained, "loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(value > 1.0 for value in tiny.logged(trained, "aux_loss"))
