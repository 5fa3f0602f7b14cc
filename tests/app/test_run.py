"""Whole runs of a tiny model: from a feedback log to result.json, and what stops them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from matplotlib.image import imread
from runs import TINY, TINY_LOG, metrics_of, write_log
from transformers import AutoModelForSeq2SeqLM

PATH = "dataset.path={}"


@pytest.fixture
def run_dir(environment: Path) -> Path:
    return environment / "run"


def test_a_run_leaves_everything_it_promises(bco_lab: Any, feedback_log: Path, run_dir: Path) -> None:
    ended = bco_lab(*TINY_LOG, PATH.format(feedback_log), "hydra.run.dir=run", "trainer.beta=0.5", "seed=3")
    assert ended.status == 0, ended.err
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "overrides.yaml", "environment.json", "metrics.jsonl", "result.json", "run.log"} < names
    assert {"checkpoints", "model", "wandb", "plots"} < names
    assert not list(run_dir.rglob("*.pkl")) + list(run_dir.rglob("training_args.bin"))

    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["trainer"]["beta"] == 0.5
    assert config["trainer"]["seed"] == config["dataset"]["seed"] == 3
    assert "${" not in (run_dir / "config.yaml").read_text()
    assert "trainer.beta=0.5" in yaml.safe_load((run_dir / "overrides.yaml").read_text())

    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["seed"] == 3
    assert environment["data"]["train_rows"] == 27
    assert environment["data"]["eval_rows"] == 3
    assert environment["data"]["split_by"] == "prompt"
    assert len(environment["data"]["fingerprint"]) == 16

    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["steps"], result["config_hash"]) == ("finished", 4, environment["config_hash"])
    assert result["metrics"]["before"]["rewards/accuracies"] == result["metrics"]["before"]["rewards/auc"] == 0.5
    assert result["objective"] == result["metrics"]["after"]["rewards/auc"]
    assert len(result["samples"]["pairs"]) == 2

    rows = metrics_of(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["delta"] == 0.0
    assert rows[3]["delta"] != 0.0
    assert imread(run_dir / "plots" / "rewards.png").std() > 0.05
    assert "held-out accuracy" in ended.out


def test_wandb_holds_the_metrics_and_the_resolved_configuration(
    bco_lab: Any, feedback_log: Path, run_dir: Path
) -> None:
    assert bco_lab(*TINY_LOG, PATH.format(feedback_log), "hydra.run.dir=run").status == 0
    shown = subprocess.run(
        [Path(sys.executable).parent / "wandb", "leet", "inspect", "--summary", "--json", str(run_dir / "wandb")],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads((run_dir / "result.json").read_text())
    last = metrics_of(run_dir)[-1]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "delta"):
        assert f"train/{name}" in shown.stdout
        assert f"eval/{name}" in shown.stdout
    assert str(last["rewards/margins"])[:8] in shown.stdout
    assert str(result["objective"])[:8] in shown.stdout


def test_tracking_that_fails_does_not_end_the_run(bco_lab: Any, feedback_log: Path, run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "wandb").write_text("in the way")
    ended = bco_lab(*TINY_LOG, PATH.format(feedback_log), "hydra.run.dir=run")
    assert ended.status == 0
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"


def test_a_finished_run_is_not_run_again(bco_lab: Any, feedback_log: Path, run_dir: Path) -> None:
    arguments = [*TINY_LOG, PATH.format(feedback_log), "hydra.run.dir=run", "wandb.mode=disabled"]
    assert bco_lab(*arguments).status == 0
    written = (run_dir / "result.json").stat().st_mtime_ns
    assert "already holds a run" in bco_lab(*arguments).error
    again = bco_lab("resume", str(run_dir))
    assert again.status == 0
    assert "is finished already" in again.out
    assert (run_dir / "result.json").stat().st_mtime_ns == written


def test_without_held_out_rows_and_without_precomputed_reference(
    bco_lab: Any, feedback_log: Path, run_dir: Path
) -> None:
    common = [*TINY_LOG, PATH.format(feedback_log), "wandb.mode=disabled"]
    assert bco_lab(*common, "hydra.run.dir=a", "trainer.precompute_ref_log_probs=false").status == 0
    assert bco_lab(*common, "hydra.run.dir=b").status == 0
    a, b = (json.loads((run_dir.parent / name / "result.json").read_text()) for name in "ab")
    assert a["metrics"]["after"]["loss"] == pytest.approx(b["metrics"]["after"]["loss"], abs=1e-5)
    assert bco_lab(*common, "hydra.run.dir=c", "dataset.eval_fraction=0").status == 0
    assert json.loads((run_dir.parent / "c" / "result.json").read_text())["objective"] is None


def test_weights_from_the_log_reach_the_loss(bco_lab: Any, tmp_path: Path, environment: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "completion": "a b c", "label": i % 2 == 0, "p": 0.75 if i % 2 else 0.1} for i in range(12)
    ]
    log = write_log(tmp_path / "weighted.jsonl", rows)
    mapped = "+dataset.columns.p_desirable=p"
    ended = bco_lab(*TINY_LOG, PATH.format(log), mapped, "hydra.run.dir=run", "dataset.eval_fraction=0")
    assert ended.status == 0, ended.err
    first = metrics_of(environment / "run")[0]
    assert first["udm/weight_mean"] == pytest.approx(3.0)
    assert first["loss"] == pytest.approx((1 + 3) * 0.693147, rel=1e-4)


def test_an_objective_that_does_not_exist_is_refused_before_training(
    bco_lab: Any, environment: Path, feedback_log: Path
) -> None:
    ended = bco_lab(*TINY_LOG, PATH.format(feedback_log), "hydra.run.dir=run", "objective=eval_foo")
    assert ended.status == 2
    assert "objective=eval_foo is not among the held-out metrics: eval_rewards/chosen" in ended.error
    assert not list((environment / "run").glob("checkpoints/*"))


def test_rows_to_evaluate_on_must_not_be_trained_on(bco_lab: Any, feedback_log: Path) -> None:
    ended = bco_lab(*TINY_LOG, PATH.format(feedback_log), f"dataset.eval_path={feedback_log}", "hydra.run.dir=run")
    assert ended.status == 2
    assert "feedback.jsonl, line 1: prompt and completion also stand in" in ended.error


def test_damaged_weights_are_one_line_that_names_the_model(bco_lab: Any, environment: Path, feedback_log: Path) -> None:
    tiny.model().save_pretrained(environment / "broken")
    tiny.tokenizer().save_pretrained(environment / "broken")
    weights = environment / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    local = [*TINY_LOG, PATH.format(feedback_log), "model.name_or_path=./broken", "hydra.run.dir=run"]
    ended = bco_lab(*local)
    assert ended.status == 2
    assert "model ./broken cannot be loaded (AutoModelForCausalLM)" in ended.error
    assert "Traceback" not in ended.err


def test_weights_that_are_not_there_are_not_drawn_at_random(
    bco_lab: Any, environment: Path, feedback_log: Path
) -> None:
    tiny.model().save_pretrained(environment / "deeper")
    tiny.tokenizer().save_pretrained(environment / "deeper")
    config = environment / "deeper" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    local = [*TINY_LOG, PATH.format(feedback_log), "model.name_or_path=./deeper", "hydra.run.dir=run"]
    ended = bco_lab(*local)
    assert ended.status == 2
    assert "model.name_or_path=./deeper lacks 9 weights of its config, such as model.layers.2." in ended.error


LONG = "word " * 60
ROW_ERRORS: list[tuple[str, str, list[str], str]] = [
    ("missing file", "", ["dataset.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ("empty file", "", [], "the file has no rows"),
    ("broken line", '{"prompt": "a", "completion": "b", "label": 1}\n{"prompt": \n', [], "line 2: not JSON"),
    (
        "missing column",
        '{"prompt": "a", "label": 1}\n',
        [],
        "line 1: no column 'completion'; the row has: prompt, label",
    ),
    (
        "unknown label",
        '{"prompt": "a", "completion": "b", "label": 1}\n{"prompt": "a", "completion": "b", "label": "meh"}\n',
        [],
        "line 2, column 'label': label 'meh' is none of",
    ),
    ("one class", '{"prompt": "a", "completion": "b", "label": 1}\n' * 4, [], "only one class present"),
    (
        "no room",
        f'{{"prompt": "{LONG}", "completion": "b", "label": 1}}\n{{"prompt": "a", "completion": "c", "label": 0}}\n',
        ["trainer.max_length=32", "dataset.eval_fraction=0"],
        "max_length=32",
    ),
]


@pytest.mark.parametrize(
    ("content", "arguments", "message"), [e[1:] for e in ROW_ERRORS], ids=[e[0] for e in ROW_ERRORS]
)
def test_a_bad_row_is_named_before_the_model_is_loaded(
    bco_lab: Any, tmp_path: Path, content: str, arguments: list[str], message: str
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    ended = bco_lab(*TINY_LOG, PATH.format(log), "hydra.run.dir=run", *arguments)
    assert ended.status == 2
    assert message in ended.error
    assert "Loading the model" not in ended.err
    assert "Traceback" not in ended.err


def test_room_can_be_made_by_truncation(bco_lab: Any, tmp_path: Path, environment: Path) -> None:
    rows = [{"prompt": LONG if i < 4 else "a", "completion": f"b {i}", "label": i % 2} for i in range(12)]
    log = write_log(tmp_path / "log.jsonl", rows)
    common = [*TINY_LOG, PATH.format(log), "trainer.max_length=32", "dataset.eval_fraction=0", "wandb.mode=disabled"]
    assert bco_lab(*common, "hydra.run.dir=a", "trainer.truncation=keep_end").status == 0
    assert bco_lab(*common, "hydra.run.dir=b", "trainer.truncation=drop").status == 0
    a, b = (json.loads((environment / name / "result.json").read_text())["tokenization"]["train"] for name in "ab")
    assert (a["rows"], a["kept"], a["truncated"], a["dropped"]) == (12, 12, 4, 0)
    assert (b["rows"], b["kept"], b["truncated"], b["dropped"]) == (12, 8, 0, 4)


def test_chat_rows_need_a_chat_template(bco_lab: Any, tmp_path: Path, environment: Path) -> None:
    tiny.model().save_pretrained(environment / "plain")
    tiny.tokenizer().save_pretrained(environment / "plain")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"w2 w{i + 3}"}],
            "completion": [{"role": "assistant", "content": "w4"}],
            "label": i % 2,
        }
        for i in range(8)
    ]
    log = write_log(tmp_path / "chat.jsonl", rows)
    local = ["model.name_or_path=./plain", "hydra.run.dir=run", "dataset.eval_fraction=0.5"]
    ended = bco_lab(*TINY_LOG, PATH.format(log), *local)
    assert ended.status == 2
    assert "chat template" in ended.error
    strings = write_log(
        tmp_path / "s.jsonl", [{**r, "prompt": f"w2 w{i}", "completion": "w4"} for i, r in enumerate(rows)]
    )
    assert bco_lab(*TINY_LOG, PATH.format(strings), *local).status == 0


def test_saved_adapter_of_a_random_model_loads_where_the_run_is(
    bco_lab: Any, feedback_log: Path, run_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert bco_lab(*TINY_LOG, PATH.format(feedback_log), "hydra.run.dir=run", "wandb.mode=disabled").status == 0
    model = AutoModelForCausalLM.from_pretrained(str(run_dir / "model"))
    tokenizer = AutoTokenizer.from_pretrained(str(run_dir / "model"))
    assert model(**tokenizer("hello", return_tensors="pt")).logits.shape[-1] == len(tokenizer)


@pytest.mark.parametrize("model", ["tiny_mixtral", "tiny_llama"])
@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_other_models_and_optimizers_train(bco_lab: Any, environment: Path, model: str, optimizer: str) -> None:
    size = ["dataset.train_size=24", "dataset.eval_size=8", "dataset.judge_size=200", "wandb.mode=disabled"]
    ended = bco_lab(*TINY, f"model={model}", f"optimizer={optimizer}", *size, "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    rows = metrics_of(environment / "run")
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["loss"] != rows[0]["loss"]
    assert ("aux_loss" in rows[0]) == (model == "tiny_mixtral")


def test_full_fine_tuning_is_a_setting(bco_lab: Any, environment: Path, feedback_log: Path) -> None:
    arguments = [*TINY_LOG, PATH.format(feedback_log), "model/adapter=none", "hydra.run.dir=run", "wandb.mode=disabled"]
    assert bco_lab(*arguments).status == 0
    assert (environment / "run" / "model" / "model.safetensors").stat().st_size > 10_000_000
    assert not (environment / "run" / "model" / "adapter_config.json").exists()


def test_a_sweep_runs_the_good_trials_and_names_the_bad_one(
    bco_lab: Any, environment: Path, feedback_log: Path
) -> None:
    ended = bco_lab(
        "-m",
        *TINY_LOG,
        PATH.format(feedback_log),
        "trainer.beta=0.1,-1,0.5",
        "hydra.sweep.dir=sweep",
        "wandb.mode=disabled",
        "generation.count=0",
    )
    assert ended.status == 2
    assert "trainer.beta=-1 must be > 0" in ended.error
    results = sorted(environment.glob("sweep/*/result.json"))
    assert len(results) == 2
    assert {yaml.safe_load((r.parent / "config.yaml").read_text())["trainer"]["beta"] for r in results} == {0.1, 0.5}


def test_demo_on_a_handful_of_rows(bco_lab: Any, environment: Path) -> None:
    small = ["dataset.train_size=8", "dataset.eval_size=4", "generation.count=3", "generation.max_new_tokens=8"]
    ended = bco_lab("hydra.run.dir=run", *small, "trainer.per_device_train_batch_size=2")
    assert ended.status == 0, ended.err
    result = json.loads((environment / "run" / "result.json").read_text())
    assert result["steps"] == 2
    assert 0.65 < result["samples"]["judge_accuracy"] < 0.85
    assert -400 < result["metrics"]["before"]["logps/chosen"] < -30
    assert "judged positive (n=3)" in ended.out
    assert os.fspath(environment) not in (environment / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_an_encoder_decoder_is_aligned_like_any_other_model(
    bco_lab: Any, environment: Path, run_dir: Path, adapter: str
) -> None:
    tiny.t5().save_pretrained(environment / "t5")
    tiny.t5_tokenizer().save_pretrained(environment / "t5")
    log = write_log(
        environment / "words.jsonl",
        [{"prompt": f"w{2 + i}", "completion": f"w{20 + i % 5} w9", "label": i % 2 == 0} for i in range(30)],
    )
    ended = bco_lab(
        *TINY_LOG,
        PATH.format(log),
        "model.name_or_path=t5",
        f"model/adapter={adapter}",
        "trainer.learning_rate=1e-2",
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=2",
        "trainer.generate_during_eval=true",
        "hydra.run.dir=run",
    )
    assert ended.status == 0, ended.err
    assert f'AutoModelForSeq2SeqLM.from_pretrained("{run_dir.name}/model")' in ended.out
    result = json.loads((run_dir / "result.json").read_text())
    assert result["metrics"]["after"]["kl"] != 0
    loaded = AutoModelForSeq2SeqLM.from_pretrained(run_dir / "model")
    assert loaded.config.is_encoder_decoder
    if adapter == "lora":
        assert json.loads((run_dir / "model" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    samples = (run_dir / "checkpoints" / "eval_samples" / "eval-step-000002.jsonl").read_text().splitlines()
    assert {"prompt", "policy", "reference"} < json.loads(samples[0]).keys()
    assert list((run_dir / "wandb").rglob("media/table/eval/samples*.table.json"))
    assert "thumbs" in (run_dir / "model" / "README.md").read_text()
