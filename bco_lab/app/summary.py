"""The last thing a run prints: what changed, what the model writes now, and where everything is."""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDTH = 100  # columns; a wider terminal gains nothing, the eye loses the row
SHOWN_PAIRS = 3
_LONGEST_SAMPLE = 240  # characters
_LONGEST_PROMPT = 160
_ROOM_FOR_MEANING = 90  # columns; on a narrower terminal the table leaves out what each number says
_NOTHING = "–"

# metric, its name in the table, format of its values, what the number says
_METRICS = (
    ("rewards/accuracies", "{split} accuracy", ".3f", "share of rewards on the right side of δ"),
    ("rewards/auc", "{split} AUC", ".3f", "how often a thumbs-up outranks a thumbs-down"),
    ("rewards/margins", "margin", "+.3f", "mean reward, thumbs-up minus thumbs-down"),
    ("kl", "KL estimate", "+.3f", "drift from the reference, nats per completion"),
    ("delta", "δ", "+.3f", "reward shift, between the two classes"),
    ("bound_gap", "bound gap", ".3f", "error term of the BCO bound, 2 before training"),
)
_JUDGED = "share of generations, in the judge's eyes"


def render_summary(console: Console, result: Mapping[str, Any]) -> None:
    """Print the summary of a run, at most 100 columns wide.

    Args:
        console: Where to print; plain text where it is not a terminal.
        result: What `result.json` holds. Every key but `status` may be missing or None.
    """
    width = min(console.width, WIDTH)
    table = _metrics_table(result, with_meaning=width >= _ROOM_FOR_MEANING)
    for part in (_headline(result), table, *_samples(result.get("samples") or {})):
        if part is not None:
            console.print()
            console.print(part, width=width, highlight=False)
    places = _places(result)
    if places:
        console.print()
        # A path or a command broken over two lines cannot be copied, so a long one runs on instead.
        console.print(places, soft_wrap=True, highlight=False)


def _headline(result: Mapping[str, Any]) -> Padding:
    finished = result.get("status") == "finished"
    text = Text()
    text.append(f"Run {result.get('status') or 'of unknown status'}", style="bold green" if finished else "bold red")
    if result.get("steps") is not None:
        text.append(f" · {result['steps']} steps")
    if result.get("wall_seconds") is not None:
        text.append(f" · {_duration(result['wall_seconds'])}")
    if result.get("objective") is not None:
        text.append(f" · {result.get('objective_name') or 'objective'} {_number(result['objective'], '.3f')}")
    return _indented(text)


def _metrics_table(result: Mapping[str, Any], *, with_meaning: bool) -> Table | None:
    metrics = result.get("metrics") or {}
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    eval_rows = result.get("eval_rows")
    split = "held-out" if eval_rows else "training"
    rows = [
        (name.format(split=split), _number(before.get(key), style), _number(after.get(key), style), meaning)
        for key, name, style, meaning in _METRICS
        if key in before or key in after
    ]
    samples = result.get("samples") or {}
    if samples.get("positive_before") is not None or samples.get("positive_after") is not None:
        shares = [_number(samples.get(f"positive_{side}"), ".0%") for side in ("before", "after")]
        rows.append((f"judged positive (n={samples.get('count', 0)})", shares[0], shares[1], _JUDGED))
    if not rows:
        return None
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True, style="bold")
    if with_meaning:
        table.add_column(f"on {eval_rows} rows never trained on" if eval_rows else "", style="dim")
    for row in rows:
        table.add_row(*row[: len(table.columns)])
    return table


def _samples(samples: Mapping[str, Any]) -> list[Padding | Table]:
    parts: list[Padding | Table] = []
    if samples.get("judge_accuracy") is not None:
        accuracy = _number(samples["judge_accuracy"], ".1%")
        sentence = (
            "The judge (TF-IDF + logistic regression, trained on rows in neither split) is right on "
            f"{accuracy} of its own held-out rows."
        )
        parts.append(_indented(Text(sentence)))
    pairs = list(samples.get("pairs") or [])
    prompts = {str(pair.get("prompt") or "") for pair in pairs}
    if len(prompts) == 1:
        parts.append(_indented(Text.assemble(("Prompt  ", "bold"), _shortened(prompts.pop(), _LONGEST_PROMPT))))
        parts.append(_pairs_table(pairs[:SHOWN_PAIRS], with_prompt=False))
    elif pairs:
        parts.append(_pairs_table(pairs[:SHOWN_PAIRS], with_prompt=True))
    return parts


def _pairs_table(pairs: list[Mapping[str, Any]], *, with_prompt: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_lines=True, expand=True)
    columns = [("prompt", 3, _LONGEST_PROMPT)] if with_prompt else []
    columns += [("before", 5, _LONGEST_SAMPLE), ("after", 5, _LONGEST_SAMPLE)]
    for name, share, _ in columns:
        header = name if name == "prompt" else f"a sample {name} training"
        table.add_column(header, ratio=share, overflow="fold", style="dim" if name == "prompt" else "")
    for pair in pairs:
        cells = [_shortened(str(pair.get(name) or ""), longest) or _NOTHING for name, _, longest in columns]
        table.add_row(*map(Text, cells))  # not as str: square brackets in a sample are no markup
    return table


def _places(result: Mapping[str, Any]) -> Text | None:
    rows = _place_rows(result)
    if not rows:
        return None
    width = max(len(what) for what, _ in rows) + 2
    return Text("\n").join(Text.assemble((f" {what:<{width}}", "dim"), where) for what, where in rows)


def _place_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    paths = {name: value for name, value in (result.get("paths") or {}).items() if value}
    rows = [("run directory", _short_path(paths["run_dir"]))] if "run_dir" in paths else []
    rows += [("plot", _short_path(plot)) for plot in paths.get("plots", [])]
    rows += [(name, _short_path(paths[name])) for name in ("metrics", "model") if name in paths]
    if "wandb" in paths:
        folder, mode = _short_path(paths["wandb"]), result.get("wandb_mode")
        rows.append((f"W&B {mode}" if mode else "W&B", folder))
        # The folder around it serves as well, is shorter, and after a resumed run leads to the newest.
        around = str(Path(folder).parent) if Path(folder).parent.name == "wandb" else folder
        rows.append(("read it", f"{_wandb()} leet inspect --summary --json {shlex.quote(around)}"))
        if mode != "online":
            rows.append(("upload it", f"{_wandb()} sync {shlex.quote(folder)}"))
    if "model" in paths:
        loader = result.get("model_class") or "AutoModelForCausalLM"
        rows.append(("use the model", f'{loader}.from_pretrained("{_short_path(paths["model"])}")'))
    return rows


def _wandb() -> str:
    """The command as it can be typed here: with its path if its environment is not active."""
    beside = Path(sys.executable).parent / "wandb"
    return "wandb" if shutil.which("wandb") or not beside.exists() else _short_path(beside)


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 1), expand=False)


def _number(value: Any, style: str) -> str:
    if value is None or not math.isfinite(value):
        return _NOTHING
    text = format(value, style)
    # "-0.000" and "+0.000" are both just zero
    return text.lstrip("+-") if not any(digit in text for digit in "123456789") else text


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _shortened(text: str, longest: int) -> str:
    """The text on one line, cut at a word where there is one near the end."""
    line = " ".join(text.split())
    if len(line) <= longest:
        return line
    cut = line[: longest - 1]
    at_word = cut.rfind(" ")
    return (cut[:at_word] if at_word > longest // 2 else cut).rstrip() + "…"


def _short_path(path: str | os.PathLike[str]) -> str:
    """Relative to the current folder if it lies below it: shorter to read, and still right to copy."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else os.fspath(path)
