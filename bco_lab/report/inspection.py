"""What an inspection found, for people: tables in the terminal and one HTML page; reads nothing but its figures."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bco_lab.files import write_text
from bco_lab.report.plots import BLUE, GREEN, GREY, VERMILION

WIDTH = 100  # columns; a wider terminal gains nothing

_NOTHING = "–"
_ROOM_FOR_SHAPES = 90  # columns; on a narrower terminal the table of lengths leaves out the little histograms
_BLOCKS = "▁▂▃▄▅▆▇█"
_CLASSES = {"desirable": "desirable (thumbs-up)", "undesirable": "undesirable (thumbs-down)"}
_PARTS = {"prompt": "prompt", "completion": "completion", "row": "whole row"}
_STYLES = {"stop": "bold red", "warning": "bold yellow", "note": "bold blue"}
# Colours that matplotlib writes and what the page, in light or dark, makes of them.
_TEXT, _GRID = "#010203", "#dcdcdc"
_COLORS = {BLUE: "var(--up)", VERMILION: "var(--down)", GREEN: "var(--ratio)", GREY: "var(--quiet)"} | {
    _TEXT: "currentColor",
    _GRID: "var(--line)",
}
_SIZE_INCHES = (4.1, 2.6)  # small, so that the text is still readable on a phone
_UDM_TITLE = "What UDM would do"
_SHOWN_EXAMPLES, _LONGEST_EXAMPLE = 3, 100  # in the terminal; characters
_SHOWN_IDS = 3


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        columns: Name and kind of each: "name", "number", "text" (from the data, may be long) or "shape".
        rows: Of cells.
        title: Above it.
        marked: Rows that stand for what was asked for.
    """

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]
    title: str = ""
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        key: Of its plots, and where links lead.
        title: Of the section.
        sentences: Before the tables.
        grids: Its tables.
    """

    key: str
    title: str
    sentences: Sequence[str] = ()
    grids: Sequence[Grid] = field(default_factory=tuple)


def render_inspection(console: Console, content: Mapping[str, Any]) -> None:
    """Print an inspection, at most 100 columns wide.

    Args:
        console: Where to print; plain text where it is not a terminal.
        content: What `Inspection.to_dict()` returns, or what was read back from its JSON.
    """
    width = min(console.width, WIDTH)
    counts = content["counts"]
    headline = f"{_clean(content['name'])} · {_count(counts['rows'])} rows"
    share = f" · {_percent(counts['desirable_share'])} desirable"
    parts: list[RenderableType] = [
        _indented(Text.assemble((headline, "bold"), share)),
        _indented(Text(content["recommendation"], style="bold green")),
        *map(_finding, content["findings"]),
    ]
    for section in _sections(content):
        parts.append(_indented(Text(section.title, style="bold underline")))
        parts += [_indented(Text(sentence)) for sentence in section.sentences]
        parts += [_table(grid, with_shapes=width >= _ROOM_FOR_SHAPES) for grid in section.grids]
    for part in parts:
        console.print()
        console.print(part, width=width, highlight=False)


def write_inspection_html(content: Mapping[str, Any], path: Path) -> Path:
    """Write an inspection as one page that needs no other file and no network.

    Args:
        content: What `Inspection.to_dict()` returns, or what was read back from its JSON.
        path: Of the page, which appears whole or not at all.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else _clean(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("inspection.html.jinja").render(
        name=content["name"],
        recommendation=content["recommendation"],
        findings=content["findings"],
        tiles=_tiles(content),
        sections=_sections(content),
        plots=_plots(content),
    )
    write_text(path, page)
    return path


# ---- what is said, for terminal and page alike ----


def _sections(content: Mapping[str, Any]) -> list[Section]:
    found = [_rows(content), _lengths(content), _truncation(content), _length_signal(content), _repeats(content)]
    if content["prompt_shift"]:
        found.append(_prompt_shift(content["prompt_shift"]))
        found.append(_udm(content["udm"], fitted=_fitted(content)))
    return found


def _fitted(content: Mapping[str, Any]) -> bool:
    """Whether a classifier could be fitted to the prompts."""
    return bool(content["prompt_shift"]) and content["prompt_shift"]["classifier"]["auc"] is not None


def _tiles(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures at the top of the page: value and what it is."""
    counts, shift = content["counts"], content["prompt_shift"] or {}
    return [
        (_count(counts["rows"]), "rows"),
        (_percent(counts["desirable_share"]), "desirable"),
        (_count(counts["prompts"]), "prompt" if counts["prompts"] == 1 else "different prompts"),
        (_number(content["length_signal"]["auc"], ".2f"), "AUC of completion length"),
        (_number(shift.get("classifier", {}).get("auc"), ".2f"), "AUC of the prompt"),
    ]


def _rows(content: Mapping[str, Any]) -> Section:
    counts, loading = content["counts"], content["loading"] or {}
    per_prompt, most = counts["rows_per_prompt"], counts["most_rows_of_a_prompt"]
    facts = [
        ("rows", _count(counts["rows"])),
        ("desirable", f"{_count(counts['desirable'])} ({_percent(counts['desirable_share'])})"),
        ("undesirable", f"{_count(counts['undesirable'])} ({_percent(1 - counts['desirable_share'])})"),
        ("different prompts", _count(counts["prompts"])),
        ("rows per prompt", f"{per_prompt:,.{0 if per_prompt >= 100 else 2}f} (most: {_count(most)})"),
    ]
    if counts["held_out"] is not None:
        facts.append(("held out of training", _count(counts["held_out"])))
    if loading.get("split_by"):
        facts.append(("split by", str(loading["split_by"])))
    if loading.get("records") is not None:
        facts.append(("records read", _count(loading["records"])))
    if loading.get("rejected"):
        facts.append(("records that break a rule", _count(loading["rejected"])))
    facts += [(f"left out: {reason}", _count(number)) for reason, number in (loading.get("left_out") or {}).items()]
    if content["times"]:
        times = content["times"]
        facts += [(f"{which} thumb, UTC", times[which][:16].replace("T", " ")) for which in ("first", "last")]
    grids = [Grid((("what", "name"), ("value", "number")), facts)]
    if content["sources"]:
        table = [[s["source"], _count(s["rows"]), _percent(s["desirable_share"])] for s in content["sources"]]
        grids.append(Grid((("source", "text"), ("rows", "number"), ("desirable", "number")), table, "By source"))
    return Section("rows", "Rows", (), grids)


def _lengths(content: Mapping[str, Any]) -> Section:
    columns = (
        ("tokens of the", "name"),
        ("thumbs", "name"),
        *((name, "number") for name in ("mean", "median", "95%", "max")),
    )
    table = []
    for part, name in _PARTS.items():
        for label in _CLASSES:
            found = content["lengths"][part][label]
            figures = [_number(found[key], ",.0f") for key in ("mean", "median", "p95", "max")]
            table.append([name, label, *figures, _shape(found["counts"])])
    note = "95%: that many rows are no longer than this. A row holds prompt, completion and special tokens."
    return Section("lengths", "Lengths in tokens", (note,), (Grid((*columns, ("histogram", "shape")), table),))


def _truncation(content: Mapping[str, Any]) -> Section:
    settings, mode = content["settings"], content["settings"]["truncation"]
    extra = {"drop": ("dropped", "left out"), "keep_start": ("refused", "refused")}.get(mode)
    columns = ["limit", "whole rows", "cut", *([extra[1]] if extra else []), "tokens lost", "ups hit", "downs hit"]
    table = [
        [
            _NOTHING if cut["max_length"] is None else str(cut["max_length"]),
            _count(cut["whole"]),
            _count(cut["truncated"]),
            *([_count(cut[extra[0]])] if extra else []),
            _percent(cut["lost_tokens"]),
            _percent(cut["affected_desirable"]),
            _percent(cut["affected_undesirable"]),
        ]
        for cut in content["truncation"]
    ]
    cap = settings["max_completion_length"]
    limits = f"trainer.truncation={mode}" + (f", trainer.max_completion_length={cap}" if cap else "")
    sentence = f"What a limit does under {limits}. Asked for: trainer.max_length={settings['max_length']}."
    if mode == "keep_start":
        sentence += " Refused rows, whose prompt leaves no room for a completion, stop a training."
    marked = frozenset(i for i, cut in enumerate(content["truncation"]) if cut["asked"])
    grid = Grid([(column, "number") for column in columns], table, "", marked)
    return Section("truncation", "Truncation", (sentence,), (grid,))


def _length_signal(content: Mapping[str, Any]) -> Section:
    signal, lengths = content["length_signal"], content["lengths"]["completion"]
    facts = [
        ("AUC of completion length", _number(signal["auc"], ".3f")),
        (f"95% interval ({signal['clusters']} as units)", _interval(signal, ".3f")),
        ("Spearman's rank correlation", _number(signal["spearman"], "+.3f")),
        *((f"mean tokens, {label}", _number(lengths[label]["mean"], ",.1f")) for label in _CLASSES),
    ]
    grid = Grid((("what", "name"), ("value", "number")), facts)
    return Section("length-signal", "Do thumbs just reward long answers?", (signal["verdict"],), (grid,))


def _repeats(content: Mapping[str, Any]) -> Section:
    duplicates, contradictions = content["repeats"]["duplicates"], content["repeats"]["contradictions"]
    mixed, rows = content["repeats"]["mixed_prompts"], content["counts"]["rows"]
    facts = [
        ("rows that repeat an earlier one", _of(duplicates["rows"], rows)),
        ("completions with both labels", _count(contradictions["pairs"])),
        ("rows that contradict another", _of(contradictions["rows"], rows)),
        ("prompts seen with both labels", _of(mixed["prompts"], content["counts"]["prompts"])),
        ("rows of such prompts", _of(mixed["rows"], rows)),
    ]
    grids = [Grid((("what", "name"), ("value", "number")), facts)]
    for title, found in (("Duplicates", duplicates), ("Contradictions", contradictions)):
        if found["examples"]:
            grids.append(_examples(title, found["examples"]))
    return Section("repeats", "Duplicates and contradictions", (), grids)


def _examples(title: str, examples: Sequence[Mapping[str, Any]]) -> Grid:
    columns = (("example_id", "name"), ("up", "number"), ("down", "number"), ("prompt", "text"), ("completion", "text"))
    table = [
        [
            ", ".join(map(str, e["example_ids"][:_SHOWN_IDS])) + ("…" if _total(e) > _SHOWN_IDS else ""),
            _count(e["desirable"]),
            _count(e["undesirable"]),
            e["prompt"],
            e["completion"],
        ]
        for e in examples
    ]
    return Grid(columns, table, f"{title}, for example")


def _total(example: Mapping[str, Any]) -> int:
    return int(example["desirable"] + example["undesirable"])


def _prompt_shift(shift: Mapping[str, Any]) -> Section:
    found = shift["classifier"]
    if found["auc"] is None:
        return Section("prompt-shift", "Prompts of both classes", (f"Not compared: {found['reason']}.",))
    sentence = (
        f"From the prompt alone, a classifier tells desirable from undesirable rows with AUC {found['auc']:.3f} "
        f"(95% interval {_interval(found, '.3f')}), each prompt judged by a model that has not seen it. "
        "0.5 is chance; p is the probability of a thumbs-up if both were as frequent."
    )
    columns = (("p", "number"), ("up", "number"), ("down", "number"), ("prompt", "text"))
    titles = {"most_desirable": "Most like a thumbs-up", "most_undesirable": "Most like a thumbs-down"}
    grids = [
        Grid(
            columns,
            [[f"{e['p']:.3f}", _count(e["desirable"]), _count(e["undesirable"]), e["prompt"]] for e in shift[key]],
            title,
        )
        for key, title in titles.items()
        if shift[key]
    ]
    return Section("prompt-shift", "Prompts of both classes", (sentence,), grids)


def _udm(udm: Mapping[str, Any], *, fitted: bool) -> Section:
    if not fitted:
        return Section("udm", _UDM_TITLE, ("Nothing: every undesirable row would keep the weight 1.",))
    weights = udm["weights"]
    sentence = (
        f"Under the bounds asked for the {_count(weights['rows'])} undesirable rows would weigh {weights['mean']:.3f} "
        f"on average and count like {weights['effective_sample_size']:,.0f} rows of equal weight. Before clamping the "
        f"mean is {_number(weights['unclamped_mean'], '.3f')}; about 1 says that the probabilities are right."
    )
    columns = ("mean weight", "worth in rows", "worth", "clamped below", "above")
    table = [
        [
            f"{a['min']:g} – {a['max']:g}",
            _number(a["mean"], ".3f"),
            _number(a["effective_sample_size"], ",.0f"),
            _percent(a["effective_sample_size"] / a["rows"]),
            _percent(a["share_below_min"]),
            _percent(a["share_above_max"]),
        ]
        for a in udm["alternatives"]
    ]
    marked = frozenset(i for i, a in enumerate(udm["alternatives"]) if a["asked"])
    numbers = [(column, "number") for column in columns]
    grid = Grid([("bounds", "name"), *numbers], table, "Bounds: udm.min_density_ratio, udm.max_density_ratio", marked)
    return Section("udm", _UDM_TITLE, (sentence,), (grid,))


# ---- the terminal ----


def _finding(finding: Mapping[str, str]) -> Padding:
    label = (f"{finding['level']}: ", _STYLES[finding["level"]])
    return _indented(Text.assemble(label, _clean(finding["finding"]), (f" → {_clean(finding['action'])}", "dim")))


def _table(grid: Grid, *, with_shapes: bool) -> Table:
    shown = [i for i, (_name, kind) in enumerate(grid.columns) if with_shapes or kind != "shape"]
    kinds = [grid.columns[i][1] for i in shown]
    facts = [name for name, _kind in grid.columns] == ["what", "value"]
    texts = kinds.count("text")
    table = Table(
        box=None if facts else box.SIMPLE_HEAD,
        show_edge=False,
        show_header=not facts,
        title=Text(f" {grid.title}", style="dim") if grid.title else None,
        title_justify="left",
        expand=texts > 0 and len(kinds) > 3,
    )
    for i, kind in zip(shown, kinds, strict=True):
        table.add_column(
            grid.columns[i][0],
            justify="right" if kind == "number" else "left",
            overflow="fold",
            no_wrap=kind == "name" and not table.expand and not facts,
            ratio=1 if kind == "text" and table.expand else None,
        )
    for number, row in enumerate(grid.rows[:_SHOWN_EXAMPLES] if table.expand else grid.rows):
        cells = [_shortened(row[i], _LONGEST_EXAMPLE) if table.expand else row[i] for i in shown]
        style = "bold" if number in grid.marked else ""
        table.add_row(*(Text(_clean(cell)) for cell in cells), style=style)  # not as str: brackets are no markup
    return table


def _shape(counts: Sequence[int], longest: int = 20) -> str:
    """A histogram in one line of text, neighbouring bins taken together."""
    if not sum(counts):
        return _NOTHING
    parts = [part.sum() for part in np.array_split(np.asarray(counts), min(longest, len(counts)))]
    steps = [math.ceil(part / max(parts) * len(_BLOCKS)) for part in parts]
    return "".join(_BLOCKS[step - 1] if step else " " for step in steps)


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 1), expand=False)


# ---- plots ----


def _plots(content: Mapping[str, Any]) -> dict[str, list[Markup]]:
    """SVG by the section it belongs to."""
    settings = content["settings"]
    lengths = [
        _svg(_plot_lengths(name, content["lengths"][part], settings["max_length"] if part == "row" else None), part)
        for part, name in _PARTS.items()
        if len(content["lengths"][part]["edges"]) > 2  # where all are equally long the table says it all
    ]
    plots = {"lengths": lengths}
    if _fitted(content):
        plots["prompt-shift"] = [_svg(_plot_probabilities(content["prompt_shift"]["histogram"]), "probabilities")]
        bounds = (settings["min_density_ratio"], settings["max_density_ratio"])
        plots["udm"] = [_svg(_plot_ratios(content["udm"]["histogram"], bounds), "ratios")]
    return plots


def _plot_lengths(name: str, lengths: Mapping[str, Any], limit: int | None) -> Figure:
    figure, axes = _axes(f"Tokens of the {name}")
    edges = lengths["edges"]
    axis = axes.xaxis
    if lengths["scale"] == "log":
        edges = [max(edge, 0.5) for edge in edges]  # rows without such a token get a bin of their own, left of 1
        axes.set_xscale("log")
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if edges[-1] < 200 * max(1, edges[0]) else (1,)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:,.0f}"))
    _draw_classes(axes, edges, lengths)
    axes.set_xlim(edges[0], edges[-1])
    tail = f"tokens (the last bin goes on to {lengths['largest']:,})" if lengths["largest"] >= edges[-1] else "tokens"
    axes.set_xlabel(tail)
    if limit is not None and edges[0] < limit < edges[-1]:
        axes.axvline(limit, color=_TEXT, linewidth=1.2, linestyle=":", label=f"max_length {limit}")
    _legend(axes)
    return figure


def _plot_probabilities(histogram: Mapping[str, Any]) -> Figure:
    figure, axes = _axes("p(desirable | prompt), held out")
    _draw_classes(axes, histogram["edges"], histogram)
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability")
    _legend(axes)
    return figure


def _plot_ratios(histogram: Mapping[str, Any], bounds: tuple[float, float]) -> Figure:
    figure, axes = _axes("Density ratio of undesirable rows")
    edges = histogram["edges"]
    axes.stairs(_shares(histogram["counts"]), edges, fill=True, color=GREEN, alpha=0.75, label="undesirable rows")
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    for low, high, label in ((edges[0], bounds[0], "clamped"), (bounds[1], edges[-1], "_nolegend_")):
        axes.axvspan(low, high, color=GREY, alpha=0.2, linewidth=0, label=label)
    axes.axvline(1.0, color=_TEXT, linewidth=1.2, linestyle=":", label="weight 1")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("ratio before clamping")
    _legend(axes)
    return figure


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_TEXT, pad=20)
    axes.set_ylabel("share of rows", color=_TEXT, fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{100 * value:.3g}%"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=_TEXT, labelsize=8)
    axes.xaxis.label.set(color=_TEXT, fontsize=8)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_classes(axes: Axes, edges: Sequence[float], by_class: Mapping[str, Any]) -> None:
    """Both classes' histograms, each as shares of its own rows."""
    for (label, name), color, line in zip(_CLASSES.items(), (BLUE, VERMILION), ("-", (0, (4, 1.5))), strict=True):
        found = by_class[label]
        shares = _shares(found["counts"] if isinstance(found, Mapping) else found)
        axes.stairs(shares, edges, fill=True, color=color, alpha=0.18, linewidth=0)
        axes.stairs(shares, edges, color=color, linestyle=line, linewidth=1.8, label=name.partition(" (")[0])


def _legend(axes: Axes) -> None:
    """One row above the panel, where it can hide no data."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
        ncols=3,
        frameon=False,
        fontsize=8,
        labelcolor=_TEXT,
        columnspacing=1.0,
        handlelength=1.4,
    )


def _shares(counts: Sequence[int]) -> np.ndarray:
    found = np.asarray(counts, dtype=float)
    return np.asarray(found / max(1.0, found.sum()))


def _svg(figure: Figure, key: str) -> Markup:
    """The figure as markup that can stand in a page beside others: names of its own, colours of the page, no links."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawn).replace("xlink:href", "href")
    drawn = re.sub(r'\bid="', f'id="{key}-', drawn)
    drawn = drawn.replace('href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    for color, replacement in _COLORS.items():
        drawn = re.sub(color, replacement, drawn, flags=re.IGNORECASE)
    title = figure.axes[0].get_title(loc="left")
    return Markup(re.sub(r"<svg [^>]*?viewBox", f'<svg role="img" aria-label="{title}" viewBox', drawn, count=1))


# ---- numbers and texts ----


def _count(value: int) -> str:
    return f"{value:,}"


def _number(value: float | None, style: str) -> str:
    if value is None:
        return _NOTHING
    text = format(value, style)
    # "-0.000" and "+0.000" are both just zero
    return text if any(digit in text for digit in "123456789") else text.lstrip("+-")


def _percent(share: float | None) -> str:
    """Whole percents, with a decimal where that says more."""
    if share is None:
        return _NOTHING
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.1%}" if 0 < share < 0.1 or 0.99 < share < 1 else f"{share:.0%}"


def _of(part: int, whole: int) -> str:
    return f"{_count(part)} ({_percent(part / whole)})"


def _interval(found: Mapping[str, Any], style: str) -> str:
    if found["auc_low"] is None:
        return _NOTHING
    return f"{found['auc_low']:{style}} to {found['auc_high']:{style}}"


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def _clean(text: str) -> str:
    """Without control characters, with which a logged text could steer a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)
