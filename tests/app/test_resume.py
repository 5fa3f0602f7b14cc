"""A run that is killed and resumed ends where an undisturbed one does, bit for bit."""

import json
import signal
import time
from pathlib import Path
from typing import Any

from runs import metrics_of
from safetensors.torch import load_file

from bco_lab.checkpoints import MARKER, last_whole_checkpoint

SETTINGS = [
    "model=tiny_llama",
    "dataset=unpaired",
    "wandb.mode=disabled",
    "generation.count=1",
    "trainer.learning_rate=0.01",
    "trainer.max_steps=60",
    "trainer.per_device_train_batch_size=2",
    "trainer.save_steps=7",
    "trainer.logging_steps=1",
]


def test_killed_and_resumed_equals_undisturbed(bco_lab: Any, start: Any, environment: Path, feedback_log: Path) -> None:
    settings = [*SETTINGS, f"dataset.path={feedback_log}"]
    assert bco_lab(*settings, "hydra.run.dir=whole").status == 0

    killed = environment / "killed"
    process = start([*settings, f"hydra.run.dir={killed}"])
    deadline = time.monotonic() + 120
    while not _steps(killed) or _steps(killed)[-1] < 18:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "result.json").exists()
    found = last_whole_checkpoint(killed / "checkpoints")
    assert found is not None
    half_written = killed / "checkpoints" / "checkpoint-59"
    half_written.mkdir()
    (half_written / "adapter_model.safetensors").write_bytes(b"half")

    resumed = bco_lab("resume", str(killed))
    assert resumed.status == 0, resumed.err
    assert f"Resuming from {found.name}" in resumed.err
    whole = environment / "whole"
    expected, got = (load_file(run / "model" / "adapter_model.safetensors") for run in (whole, killed))
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    results = [json.loads((run / "result.json").read_text()) for run in (whole, killed)]
    assert results[0]["delta"] == results[1]["delta"] != 0
    assert results[0]["samples"] == results[1]["samples"]
    assert _steps(killed) == _steps(whole) == list(range(1, 61))
    assert [row["loss"] for row in metrics_of(killed)] == [row["loss"] for row in metrics_of(whole)]


def test_a_run_killed_after_its_last_step_trains_no_further(
    bco_lab: Any, environment: Path, feedback_log: Path
) -> None:
    # 27 rows and 5 steps of 4: the last step is in the middle of an epoch
    settings = [*SETTINGS, f"dataset.path={feedback_log}", "trainer.max_steps=5", "trainer.save_steps=5"]
    assert bco_lab(*settings, "hydra.run.dir=run").status == 0
    run = environment / "run"
    weights = (run / "model" / "adapter_model.safetensors").read_bytes()
    first = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    resumed = bco_lab("resume", "run")
    assert resumed.status == 0, resumed.err
    again = json.loads((run / "result.json").read_text())
    assert (run / "model" / "adapter_model.safetensors").read_bytes() == weights
    assert (again["delta"], again["steps"]) == (first["delta"], 5)
    assert again["samples"] == first["samples"]
    assert again["objective"] == first["objective"]
    assert _steps(run) == [1, 2, 3, 4, 5]


def test_resume_refuses_other_rows(bco_lab: Any, environment: Path, feedback_log: Path) -> None:
    settings = [*SETTINGS, f"dataset.path={feedback_log}", "trainer.max_steps=2"]
    assert bco_lab(*settings, "hydra.run.dir=run").status == 0
    (environment / "run" / "result.json").unlink()
    noted = (environment / "run" / "environment.json").read_text()
    feedback_log.write_text(feedback_log.read_text().replace("answer", "reply"))
    ended = bco_lab("resume", "run")
    assert ended.status == 2
    assert "the rows of dataset feedback have changed since this run began" in ended.error
    assert (environment / "run" / "environment.json").read_text() == noted


def test_damaged_files_of_a_run_are_named(bco_lab: Any, environment: Path, feedback_log: Path) -> None:
    settings = [*SETTINGS, f"dataset.path={feedback_log}", "trainer.max_steps=2"]
    assert bco_lab(*settings, "hydra.run.dir=run").status == 0
    run = environment / "run"
    (run / "result.json").unlink()
    before = (run / "before.json").read_text()
    (run / "before.json").write_text(before[:40])
    assert "before.json is damaged, not JSON" in bco_lab("resume", "run").error
    (run / "before.json").write_text(before)
    (run / "config.yaml").write_text("trainer: [")
    assert "config.yaml is damaged, not YAML" in bco_lab("resume", "run").error
    (run / "config.yaml").write_text("")
    assert "config.yaml is damaged: it holds no configuration" in bco_lab("resume", "run").error


def test_resume_of_a_folder_without_a_run_says_so(bco_lab: Any, environment: Path) -> None:
    ended = bco_lab("resume", "nowhere")
    assert ended.status == 2
    assert "holds no run: config.yaml is missing" in ended.error
    assert bco_lab("resume").status == 2
    assert "usage: bco-lab resume DIR" in bco_lab("resume", "--help").out


def test_marker_is_written_last(bco_lab: Any, environment: Path, feedback_log: Path) -> None:
    assert bco_lab(*SETTINGS, f"dataset.path={feedback_log}", "trainer.max_steps=7", "hydra.run.dir=run").status == 0
    checkpoint = environment / "run" / "checkpoints" / "checkpoint-7"
    times = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert times[MARKER] == max(times.values())
    assert set(json.loads((checkpoint / MARKER).read_text())["files"]) == set(times) - {MARKER}


def _steps(run_dir: Path) -> list[int]:
    """Steps in metrics.jsonl, also while it is being written."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [row["step"] for row in map(json.loads, lines) if row["split"] == "train"]
    except (OSError, ValueError):
        return []
