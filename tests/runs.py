"""Short runs of the command line: their settings, their input, their metrics."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A run of seconds: two-layer model, few steps, few rows.
TINY = ["model=tiny_llama", "trainer.max_steps=4", "trainer.learning_rate=0.01", "generation.count=2"]
TINY_LOG = [*TINY, "dataset=unpaired"]


def write_log(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics_of(run_dir: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of one split."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]
