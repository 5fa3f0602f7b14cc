"""`bco-lab report`: what a sweep tried, what came out, which trial to keep."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bco_lab.report.trials import read_report, write_report
from bco_lab.report.trials_table import render_report


def report_command(arguments: Sequence[str]) -> None:
    """`bco-lab report DIR`.

    Raises:
        FileNotFoundError: The folder holds neither a sweep nor a run.
    """
    parser = argparse.ArgumentParser(
        prog="bco-lab report",
        description="Compare the trials of a sweep, which may still be running, and recommend one. Reads files only; "
        "writes report.json and report.csv into the folder.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a sweep or of a run")
    parser.add_argument("--max-kl", type=float, help="largest KL estimate that a trial to keep may have")
    chosen = parser.parse_args(arguments)
    report_sweep(chosen.folder, max_kl=chosen.max_kl)


def report_sweep(folder: Path, *, max_kl: float | None = None) -> None:
    """Print the report and write its files."""
    report = read_report(folder, max_kl=max_kl)
    console = Console()
    render_report(console, report)
    paths = write_report(report, folder)
    console.print()
    for path in paths:
        console.print(f" {path.suffix.lstrip('.').upper():<5} {path}", soft_wrap=True, highlight=False)
