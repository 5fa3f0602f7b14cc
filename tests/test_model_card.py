"""Model cards of real runs, read back with huggingface_hub."""

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from bco_lab import BCOTrainer
from bco_lab.model_card import (
    CITATION,
    CardFacts,
    TrainingData,
    describe_data,
    final_metrics,
    is_hub_id,
    model_card,
    training_settings,
    write_model_card,
)

ADAPTER = CardFacts(
    name="reviews",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    repository="me/reviews",
    adapter="default",
    data=TrainingData(names=("me/feedback", "/home/me/private/log.jsonl"), desirable=3, undesirable=9),
    settings={"beta": 0.1, "density ratio": "0.5 to 10.0", "rank": 16},
    metrics={"rewards/accuracies": 0.71875, "rewards/auc": float("nan"), "loss": 1.38629, "count/chosen": 48.0},
    header={"license": "apache-2.0", "language": "en", "tags": ["mine", "bco"]},
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> BCOTrainer:
    """A LoRA run of 3 steps in 2 micro-batches of 4 on a model from a folder, evaluated and saved."""
    folder = tmp_path_factory.mktemp("card")
    tiny.model().save_pretrained(folder / "base-model")
    trainer = BCOTrainer(
        model=str(folder / "base-model"),
        args=tiny.config(folder / "out", per_device_train_batch_size=4, gradient_accumulation_steps=2),
        train_dataset=tiny.rows(24),
        eval_dataset=tiny.rows(12, seed=1),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


def facts_of(trainer: BCOTrainer) -> CardFacts:
    """What a trainer tells a card."""
    peft_config = trainer.model.peft_config["default"]
    return CardFacts(
        name="tiny-aligned",
        base_model=peft_config.base_model_name_or_path,
        adapter="default",
        data=describe_data(trainer.train_dataset),
        settings=training_settings(
            trainer.args, trainer.state, processes=1, optimizer=trainer.optimizer, peft_config=peft_config
        ),
        metrics=final_metrics(trainer.state.log_history),
    )


def table(card: str, first: str) -> dict[str, str]:
    """The rows of the table whose first column is headed so."""
    lines = card.split(f"| {first} | value |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    return dict(re.fullmatch(r"\| (.*) \| (.*) \|", line).groups() for line in lines)


def read(path: Path) -> tuple[dict[str, object], str]:
    """Header and text, as the hub reads them."""
    card = ModelCard.load(path)
    return card.data.to_dict(), card.text


def test_header_holds_what_the_hub_understands_and_nothing_local(tmp_path: Path) -> None:
    header, text = read(write_model_card(tmp_path, ADAPTER))
    assert header == {
        "library_name": "peft",
        "model_name": "reviews",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "datasets": ["me/feedback"],
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": "en",
        "tags": ["bco", "bco-lab", "mine"],
    }
    assert "Data: `me/feedback`, `log.jsonl`: 12 rows, 3 desirable (25%) and 9 undesirable (75%)." in text
    assert "/home" not in text
    assert CITATION in text
    assert "https://arxiv.org/abs/2404.04656" in text


def test_tables_show_the_figures_and_a_dash_where_there_is_none() -> None:
    card = model_card(ADAPTER)
    assert table(card, "metric") == {
        "rewards/accuracies": "0.7188",
        "rewards/auc": "–",
        "loss": "1.386",
        "count/chosen": "48",
    }
    assert table(card, "setting") == {"beta": "0.1", "rank": "16"}  # the clamp did nothing without weights
    weighted = replace(ADAPTER, data=replace(ADAPTER.data, weighted=True))
    assert table(model_card(weighted), "setting")["density ratio"] == "0.5 to 10.0"
    assert "(75%), weighted." in model_card(weighted)
    assert "## Evaluation" not in model_card(replace(ADAPTER, metrics={}))


def test_a_local_base_is_named_without_its_folder_and_not_in_the_header() -> None:
    card = model_card(replace(ADAPTER, base_model="/home/me/models/base", adapter=None, encoder_decoder=True))
    assert "base_model" not in card.split("---")[1]
    assert "library_name: transformers" in card
    assert "pipeline_tag" not in card
    assert "`base` (a local copy), aligned with" in card
    assert 'AutoModelForSeq2SeqLM.from_pretrained("me/reviews")' in card
    assert "/home" not in card


@pytest.mark.parametrize("name", ["gpt2", "org/model-1.5_b", "org/data.set"])
def test_hub_ids(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    ["/a/b", "./a", "~/a", "a/b/c", "C:\\models\\a", "a/", "", "feedback.jsonl", "data/log.csv", "package://m/f"],
)
def test_paths_are_no_hub_ids(name: str) -> None:
    assert not is_hub_id(name)


def test_a_folder_with_the_form_of_a_hub_id_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/base")
    (tmp_path / "models" / "base").mkdir(parents=True)
    assert not is_hub_id("models/base")


def test_card_of_a_run(trained: BCOTrainer, tmp_path: Path) -> None:
    card = write_model_card(tmp_path, facts_of(trained)).read_text()
    metrics = table(card, "metric")
    last = trained.state.log_history[-1]
    assert metrics["rewards/accuracies"] == f"{last['eval_rewards/accuracies']:.4g}"
    assert metrics["logps/rejected"] == f"{last['eval_logps/rejected']:.4g}"
    assert metrics["count/chosen"] == "4"
    assert not [key for key in metrics if "runtime" in key or "per_second" in key]
    assert table(card, "setting") == {
        "beta": "0.1",
        "reward_shift": "ema, decay 0.9",
        "loss_reduction": "class_balanced",
        "learning_rate": "0.01",
        "schedule": "constant",
        "optimizer": "SGD",
        "batch size": "8 = 4 per device × 2 accumulated × 1 processes",
        "epochs": "1",
        "steps": "3",
        "max_length": "1024",
        "truncation": "keep_start",
        "seed": "42",
        "adapter": "LORA",
        "rank": "4",
        "alpha": "8",
        "adapter dropout": "0.0",
        "adapted modules": "q_proj, v_proj",
    }
    assert "24 rows, 8 desirable (33%) and 16 undesirable (67%)." in card
    assert f"- PEFT {version('peft')}\n- Transformers {version('transformers')}" in card
    assert str(Path(trained.args.output_dir).parent) not in card


def test_the_recipe_on_the_card_loads_the_adapter(trained: BCOTrainer) -> None:
    out = Path(trained.args.output_dir)
    code = model_card(replace(facts_of(trained), repository="REPO")).split("```python\n")[1].split("```")[0]
    assert 'AutoModelForCausalLM.from_pretrained("base-model")' in code
    code = code.replace("base-model", str(out.parent / "base-model")).replace("REPO", str(out))
    names: dict[str, object] = {}
    exec(code, names)
    ids = torch.tensor([tiny.rows(1)[0]["input_ids"]])
    loaded = names["model"]
    assert isinstance(loaded, PeftModel)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trained.model.eval()(input_ids=ids).logits)
    assert names["tokenizer"].get_vocab() == tiny.tokenizer().get_vocab()


def test_the_recipe_names_the_folder_of_a_named_adapter(trained: BCOTrainer, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(Path(trained.args.output_dir).parent / "base-model")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    PeftModel(base, config, adapter_name="thumbs").save_pretrained(tmp_path)
    card = model_card(replace(ADAPTER, repository=str(tmp_path), adapter="thumbs"))
    assert f'from_pretrained(base, "{tmp_path}", subfolder="thumbs")' in card
    base = AutoModelForCausalLM.from_pretrained(Path(trained.args.output_dir).parent / "base-model")
    assert PeftModel.from_pretrained(base, tmp_path, subfolder="thumbs").peft_config["default"].r == 2


def test_a_stream_is_not_counted() -> None:
    data = describe_data(Dataset.from_dict({"label": [True]}).to_iterable_dataset(), "me/feedback", ["config: en"])
    assert (data.desirable, data.undesirable) == (None, None)
    assert "Data: `me/feedback` (config: en): rows not counted (a stream)." in model_card(replace(ADAPTER, data=data))


def test_last_value_of_each_set_counts() -> None:
    history = [
        {"loss": 1.0, "step": 1},
        {"eval_a_loss": 3.0, "eval_a_runtime": 1.0, "step": 2},
        {"eval_b_loss": 4.0, "eval_b_steps_per_second": 1.0, "step": 2},
        {"eval_a_loss": 5.0, "step": 4},
    ]
    assert final_metrics(history) == {"a_loss": 5.0, "b_loss": 4.0}


# ---- a card that is there already ----


def test_the_empty_template_of_peft_is_replaced_with_its_local_paths(trained: BCOTrainer, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    trained.model.save_pretrained(tmp_path)
    assert "[More Information Needed]" in path.read_text()
    base = trained.model.peft_config["default"].base_model_name_or_path
    assert Path(base).is_absolute()
    assert base in path.read_text()
    header, text = read(write_model_card(tmp_path, facts_of(trained)))
    assert "base_model" not in header
    assert header["tags"] == ["bco", "bco-lab", "lora", "transformers"]
    assert "[More Information Needed]" not in text
    assert base not in path.read_text()

    once = path.read_text()
    trained.model.save_pretrained(tmp_path)  # writes into our card
    assert path.read_text() != once
    write_model_card(tmp_path, facts_of(trained))
    again = path.read_text()
    assert again.split("---\n", 2)[2] == once.split("---\n", 2)[2]
    assert read(path)[0] == header


def test_what_a_user_wrote_stays(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\nco2: 3\ntags:\n- theirs\n---\n\n# Our model\n\nDo not use for | chess.\n")
    header, text = read(write_model_card(tmp_path, replace(ADAPTER, header={"language": "de"})))
    assert text.startswith("\n# Our model\n\nDo not use for | chess.\n\n<!-- bco-lab: begin")
    assert header["license"] == "mit"
    assert header["co2"] == 3
    assert header["language"] == "de"
    assert header["tags"] == ["bco", "bco-lab", "theirs"]

    path.write_text(path.read_text() + "\n## Afterword\n")
    later = replace(ADAPTER, metrics={"rewards/auc": 0.25}, header={"license": "apache-2.0"})
    header, text = read(write_model_card(tmp_path, later))
    assert header["license"] == "apache-2.0"
    assert text.startswith("\n# Our model\n")
    assert text.endswith("\n## Afterword\n")
    assert text.count("<!-- bco-lab: begin") == 1
    assert table(text, "metric") == {"rewards/auc": "0.25"}


def test_a_header_that_cannot_be_read_is_kept_as_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: [mit\n---\nWords.\n")
    header, text = read(write_model_card(tmp_path, ADAPTER))
    assert "README.md: the header is not valid" in caplog.text
    assert header["license"] == "apache-2.0"
    assert "license: [mit\n---\nWords.\n" in text
