"""What the command says: help, configuration, and one clear line for each thing a user can get wrong."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from bco_lab.app.checks import check_keys
from bco_lab.app.main import conf_folder
from bco_lab.app.run_directory import trial_name

GROUPS = ("model", "dataset", "udm", "optimizer", "launcher", "trainer", "wandb", "experiment")
CHOICES = [
    (path.parent.relative_to(conf_folder()).as_posix(), path.stem)
    for group in GROUPS
    for path in sorted((conf_folder() / group).rglob("*.yaml"))
    if path.parent.name != "base"
]


@pytest.fixture(autouse=True)
def _runtime_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    OmegaConf.register_new_resolver("trial_name", trial_name, replace=True)


def test_help_names_every_group_and_command(bco_lab: Any) -> None:
    shown = bco_lab("--help")
    assert shown.status == 0
    for group in GROUPS:
        assert f"\n{group}: " in shown.out
    assert "bco-lab resume DIR" in shown.out
    assert "mixtral" in shown.out


def test_configuration_and_defaults_can_be_looked_at(bco_lab: Any) -> None:
    assert "beta: 0.3" in bco_lab("trainer.beta=0.3", "--cfg", "job").out
    assert "model/adapter" in bco_lab("--info", "defaults").out
    assert "complete -o nospace" in bco_lab("-sc", "install=bash").out


def test_completion_offers_the_choices_of_a_group(environment: Path) -> None:
    line = {"COMP_LINE": "bco-lab model=ti", "COMP_POINT": "16"}
    shown = subprocess.run(
        [sys.executable, "-m", "bco_lab.app.main", "-sc", "query=bash"],
        env={**os.environ, **line},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "model=tiny_llama" in shown.stdout
    assert "model=tiny_mixtral" in shown.stdout


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_shipped_choice_composes_from_known_keys(group: str, choice: str) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        cfg = compose("config", overrides=[f"{group}={choice}", "name=x"])
    needs_extra = {"adamw_8bit": "bitsandbytes", "lion": "lion"}
    if choice in needs_extra:
        with pytest.raises(ImportError, match=rf"pip install 'bco-lab\[{needs_extra[choice]}\]'"):
            check_keys(cfg)
    else:
        check_keys(cfg)
    if (group, choice) == ("experiment", "demo_control"):
        assert cfg.dataset.shuffle_labels
    if (group, choice) == ("model/adapter", "none"):
        assert (cfg.model.peft, cfg.trainer.learning_rate) == (None, 5e-7)
    if (group, choice) == ("model", "mixtral"):
        assert cfg.model.config_overrides.output_router_logits
        assert cfg.model.peft.target_modules == "all-linear"


KEY_ERRORS = [
    (["trainer.bta=0.3"], "trainer.bta is not a known key; did you mean trainer.beta?"),
    (["+trainer.max_grad_nrm=1"], "did you mean trainer.max_grad_norm?"),
    (["+modle.revision=x"], "modle is not a known key; did you mean model?"),
    (["+model.peft.lora_alfa=3"], "did you mean model.peft.lora_alpha?"),
    (["trainer.max_grad_norm=1"], "add it with a plus, +trainer.max_grad_norm="),
    (["trainer.output_dir=x"], "choose that with hydra.run.dir"),
    (["+trainer.output_dir=x"], "choose that with hydra.run.dir"),
    (["model=mixtrall"], "Could not find 'model/mixtrall'"),
    (["dataset=unpaired"], "dataset.path must be given"),
    (["trainer.beta=0"], "trainer.beta=0 must be > 0"),
    (["trainer.beta=inf"], "trainer.beta=inf must be a finite number"),
    (["trainer.max_steps=0"], "trainer.max_steps=0 must be >= 1, or -1"),
    (["trainer.num_train_epochs=0"], "trainer.num_train_epochs=0 must be > 0"),
    (["trainer.per_device_train_batch_size=2.5"], "trainer.per_device_train_batch_size=2.5 must be a whole number"),
    (["trainer.gradient_accumulation_steps=0"], "trainer.gradient_accumulation_steps=0 must be >= 1"),
    (["trainer.max_length=null", "trainer.learning_rate=abc"], "trainer.learning_rate=abc must be a finite number"),
    (["+trainer.report_to=wandb"], "trainer.report_to=['wandb'] is the wandb group's"),
    (["hydra.run.dir=a=b"], "quote a value with special characters"),
    (["model=tiny_llama", "model/quantization=4bit"], "model.quantization is for weights that are loaded"),
    (["model.dtype=float8"], "model.dtype=float8 must be one of auto, float32, bfloat16, float16"),
    (["trainer.truncation=left"], "trainer.truncation=left must be one of keep_start, keep_end, drop"),
    (["trainer.min_density_ratio=20"], "trainer.min_density_ratio=20 must be in (0, max_density_ratio=10.0]"),
    (["wandb.mode=sometimes"], "wandb.mode=sometimes must be one of offline, online, disabled"),
    (["launcher=ddp", "launcher.num_processes=0"], "launcher.num_processes=0 must be >= 1"),
    (["log.jsonl"], "log.jsonl: settings are key=value, such as dataset.path=log.jsonl"),
    (["objective=loss"], "objective=loss must be a held-out metric"),
    (["optimizer=muon", "model/adapter=none"], "optimizer=muon updates matrices only"),
    (["optimizer=adamw_8bit"], "pip install 'bco-lab[bitsandbytes]'"),
    (["+trainer.hub_token=abc"], "trainer.hub_token would be written into the run directory"),
    (["model.name_or_path=./nowhere"], "model folder ./nowhere does not exist"),
    (["model.name_or_path=package://no_such/x.gguf"], "package no-such is not installed"),
    (["model.name_or_path=null"], "model.name_or_path=null must be a hub id or a folder"),
    (["seed=[1"], "no viable alternative at input '[1'"),
]


@pytest.mark.parametrize(("arguments", "message"), KEY_ERRORS, ids=[" ".join(a) for a, _ in KEY_ERRORS])
def test_a_wrong_setting_is_one_clear_line_and_starts_nothing(
    bco_lab: Any, environment: Path, arguments: list[str], message: str
) -> None:
    ended = bco_lab("hydra.run.dir=run", *arguments)
    assert ended.status == 2
    assert message in ended.error
    assert "Traceback" not in ended.err
    assert "Loading the model" not in ended.err
    assert not list(environment.rglob("config.yaml"))


def test_folder_without_weights(bco_lab: Any, environment: Path) -> None:
    (environment / "empty").mkdir()
    assert "has no config.json" in bco_lab("model.name_or_path=./empty").error
    (environment / "empty" / "config.json").write_text("{}")
    assert "model folder ./empty has no weights" in bco_lab("model.name_or_path=./empty").error


def test_output_folder_that_cannot_be_written(bco_lab: Any, environment: Path) -> None:
    (environment / "outputs").write_text("a file, not a folder")
    ended = bco_lab("model=tiny_llama")
    assert ended.status == 2
    assert "outputs" in ended.error
    assert (environment / "outputs").read_text() == "a file, not a folder"


def test_trial_names_are_readable_and_never_clash() -> None:
    assert trial_name("trainer.beta=0.1,udm=on") == "trainer.beta=0.1,udm=on"
    slash, dash = (trial_name(f"trainer.beta=0.1,model{sign}adapter=none") for sign in "/-")
    assert slash.startswith("trainer.beta=0.1,model-adapter=none-")
    assert dash == "trainer.beta=0.1,model-adapter=none"
    assert trial_name("") == "defaults"
    first, second = (trial_name("x" * 300 + end) for end in "ab")
    assert first != second
    assert max(len(first), len(second)) <= 120
