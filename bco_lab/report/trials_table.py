"""The trials of a sweep in the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bco_lab.report.trials import Line, SweepReport

WIDTH = 100  # columns; a wider terminal gains nothing

# metric, heading, format
_COLUMNS = (
    ("rewards/auc", "AUC", ".3f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("rewards/margins", "margin", "+.2f"),
    ("kl", "KL", "+.2f"),
    ("bound_gap", "bound gap", ".2f"),
)


def render_report(console: Console, report: SweepReport) -> None:
    """Print what was tried, what came out and what to keep."""
    width = min(console.width, WIDTH)
    counts = {status: sum(trial.status == status for trial in report.trials) for status in _STATUSES}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    console.print()
    console.print(Padding(Text.assemble((report.name, "bold"), f" · {len(report.trials)} trials: {said}"), (0, 1)))
    if report.lines:
        console.print()
        console.print(_table(report), width=width)
        seeds = max(len(line.trials) for line in report.lines)
        note = "Held-out metrics, best first" + (f"; mean ± standard error of up to {seeds} seeds" if seeds > 1 else "")
        console.print(Padding(Text(f"{note}. KL: drift from the reference, nats per completion.", "dim"), (0, 1)))
    for trial in report.trials:
        if trial.status not in ("finished", "pending"):
            why = f": {trial.error}" if trial.error else ""
            console.print(Padding(Text.assemble((trial.status, "bold red"), f"  {trial.name}{why}"), (0, 1)))
    for note in report.notes:
        console.print(Padding(Text(f"passed over: {note}", "yellow"), (0, 1)))
    if report.advice is not None:
        console.print()
        console.print(Padding(Text.assemble(("keep  ", "bold green"), report.advice.trial), (0, 1)), width=width)
        console.print(Padding(Text(f"{report.advice.reason}. The rule: {report.advice.rule}."), (0, 1)), width=width)


_STATUSES = ("finished", "running", "pending", "failed", "interrupted", "unknown")


def _table(report: SweepReport) -> Table:
    keys = [key for key in report.swept if any(key in line.settings for line in report.lines)]
    shown = [column for column in _COLUMNS if any(column[0] in line.mean for line in report.lines)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in _short(keys):
        table.add_column(Text(name), overflow="fold")
    for _, heading, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    if any(line.shared for line in report.lines):
        table.add_column("also", overflow="fold", style="dim")
    for line in report.lines:
        kept = report.advice is not None and line.trials[0] == report.advice.trial
        cells = [Text(line.settings.get(key, "")) for key in keys]
        cells += [Text(_value(line, name, style)) for name, _, style in shown]
        if len(table.columns) > len(cells):
            cells.append(Text(_others(line.shared, line)))
        table.add_row(*cells, style="bold" if kept else "")
    return table


def _short(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or all of it where two end alike."""
    ends = [key.rsplit(".", 1)[-1] for key in keys]
    return [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]


def _value(line: Line, name: str, style: str) -> str:
    if name not in line.mean:
        return "–"
    error = line.error.get(name)
    return format(line.mean[name], style) + ("" if error is None else f" ± {error:{style.lstrip('+')}}")


def _others(shared: Sequence[str], line: Line) -> str:
    """Trials with the same result, by what differs from the line's own settings."""
    own = {f"{key}={value}" for key, value in line.settings.items()}
    different = ([_ending(part) for part in name.split(",") if part not in own] for name in shared)
    return "; ".join(",".join(each) for each in different)


def _ending(setting: str) -> str:
    """`udm.max_density_ratio=0.5` to `max_density_ratio=0.5`."""
    key, equals, value = setting.partition("=")
    return key.rsplit(".", 1)[-1] + equals + value
