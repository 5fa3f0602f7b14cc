"""Step by step: what TRL 1.13.0's BCOTrainer logs, what ours logs under the compatibility recipe, and the difference.

    python benchmarks/parity.py --lora --accumulation 4 --one-sided

Trains the tiny models of the tests, both sides in float32 on the CPU. A `-` is a class that the step does not have.
"""

import argparse
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

# The trainers' runs live beside the tests; this folder goes, where parity.py would hide the package of that name.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "tests")
os.environ.setdefault("TQDM_DISABLE", "1")  # TRL's bars have no other switch

import datasets
from parity.side_by_side import KEYS, Case, Run, largest_difference, reward_movement, train_both
from rich.console import Console
from rich.table import Table

TABLES = (("loss", "delta"), ("rewards/chosen", "rewards/rejected"))
TOLERANCE = 1e-5


def main() -> int:
    """Train both, print the tables; the exit status is 1 if they are further apart than the tolerance."""
    case = parse(sys.argv[1:])
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated")  # TRL and peft use the old name
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = train_both(case, Path(folder))
    console = Console()
    for keys in TABLES:
        console.print(steps(theirs, ours, keys, f"{case}: TRL 1.13.0 and ours"))
    apart = {key: largest_difference(theirs, ours, key) for key in KEYS}
    console.print("Largest differences: " + ", ".join(f"{key} {value:.1e}" for key, value in apart.items()))
    console.print(f"Training moved a row's reward by {reward_movement(ours):.3f} on average.")
    agreed = max(apart.values()) < TOLERANCE
    console.print(f"[green]Equal to {TOLERANCE:g}." if agreed else f"[red]Not equal to {TOLERANCE:g}.")
    return 0 if agreed else 1


def parse(arguments: list[str]) -> Case:
    """The way of training that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true", help="an adapter, not all weights")
    parser.add_argument("--explicit-reference", action="store_true", help="a ref_model with other weights")
    parser.add_argument("--accumulation", type=int, default=1, choices=(1, 2, 4, 8), help="micro-batches of a step")
    parser.add_argument("--one-sided", action="store_true", help="rows sorted by label")
    parser.add_argument("--precompute", action="store_true", help="reference log-probs ahead")
    parser.add_argument("--mixtral", action="store_true", help="a mixture of experts with its auxiliary loss")
    return Case(**vars(parser.parse_args(arguments)))


def steps(theirs: Run, ours: Run, keys: tuple[str, ...], title: str) -> Table:
    """One line per step, three columns per metric."""
    table = Table("step", title=title)
    for key in keys:
        for heading in (key.replace("/", "\n") + "\nTRL", "ours", "apart"):
            table.add_column(heading, justify="right", no_wrap=True)
    for step, (a, b) in enumerate(zip(theirs.logs, ours.logs, strict=True), start=1):
        cells = [cell for key in keys for cell in triple(a.get(key, math.nan), b[key])]
        table.add_row(str(step), *cells)
    return table


def triple(theirs: float, ours: float) -> tuple[str, str, str]:
    """TRL's value, ours and how far they are apart."""
    if math.isnan(theirs):
        return ("-", "-" if math.isnan(ours) else f"{ours:.6f}", "")
    return (f"{theirs:.6f}", f"{ours:.6f}", f"{abs(theirs - ours):.0e}")


if __name__ == "__main__":
    sys.exit(main())
