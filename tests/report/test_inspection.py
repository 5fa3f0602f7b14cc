"""What an inspection shows: figures in terminal and page, texts of the log kept harmless, a page that stands alone."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from rich.cells import cell_len
from rich.console import Console

from bco_lab.inspection import inspect_rows
from bco_lab.prompt_classifier import UdmDiagnostics
from bco_lab.report.inspection import render_inspection, write_inspection_html

NASTY = '</td><script>alert("x")</script> [bold]w2[/bold] \x1b[31mred {{ name }} &amp;'
HEBREW = "שלום עולם 🎬👩‍🚀"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class _Page(HTMLParser):
    """Elements, texts and references of a page; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self._open:
            self.texts.append(data.strip())

    def all(self, attribute: str) -> list[str]:
        return [value for _tag, attrs in self.elements if (value := attrs.get(attribute)) is not None]


def _content(**options: Any) -> dict[str, Any]:
    """44 rows, half of them desirable, on 4 prompts."""
    prompts = [NASTY, HEBREW, "w5 w6 w7 w8 w9 w10", "w11"]
    rows = [(prompts[number % 4], "w3 " * (1 + number % 7), number % 2 == 0) for number in range(40)]
    rows += [(NASTY, "w3 w4", True)] * 2 + [(HEBREW, NASTY, label) for label in (False, False)]
    prompt, completion, label = zip(*rows, strict=True)
    columns: dict[str, Any] = {"prompt": prompt, "completion": completion, "label": label, "example_id": range(44)}
    columns |= {"source": [NASTY if number % 2 else "model-a" for number in range(44)]}
    columns |= {"timestamp": [f"2026-03-{1 + number % 28:02}T08:30:00Z" for number in range(44)]}
    p = {NASTY: 0.9, HEBREW: 0.1, "w5 w6 w7 w8 w9 w10": 0.6, "w11": 0.2}
    known = UdmDiagnostics(44, 4, 22, 22, 8, 22, 22, 4, 0.1, 0.8125, 0.7031, 0.9219, 0.55)
    defaults: dict[str, Any] = {
        "max_length": 8,
        "max_completion_length": None,
        "truncation": "keep_start",
        "p_desirable": [p[text] for text in prompt],
        "diagnostics": known,
        "min_density_ratio": 0.3,
        "max_density_ratio": 3.0,
        "name": f"logs/<{HEBREW}>",
        "loading": {"records": 50, "rejected": 1, "left_out": {"no label": 5}, "split_by": "prompt"},
        "held_out": 4,
    }
    columns = {key: list(values) for key, values in columns.items()}
    content = inspect_rows(Dataset.from_dict(columns), tiny.tokenizer(), **(defaults | options)).to_dict()
    loaded: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))  # as the command would read it back
    return loaded


def _printed(content: dict[str, Any], width: int) -> str:
    buffer = io.StringIO()
    render_inspection(Console(file=buffer, width=width), content)
    return buffer.getvalue()


def _flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return _content()


@pytest.fixture(scope="module")
def text(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_inspection_html(content, tmp_path_factory.mktemp("page") / "new" / "inspection.html")
    assert [file.name for file in path.parent.iterdir()] == ["inspection.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> _Page:
    return _Page(text)


# 22 undesirable rows at p = 0.1 (12) and 0.2 (10): ratios 1/9 and 1/4, all clamped to 0.3.
FIGURES = ["22 (50%)", "0.300", "100%", "0.812", "0.703 to 0.922", "2026-03-01 08:30", "0.3 – 3", "0.5 – 10", "0.900"]


@pytest.mark.parametrize("figure", [*FIGURES, "44", "0.81"])
def test_the_page_has_the_figures(page: _Page, figure: str) -> None:
    assert any(re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", words) for words in page.texts)


@pytest.mark.parametrize("width", [60, 100])
def test_the_terminal_has_the_figures(content: dict[str, Any], width: int) -> None:
    printed = _printed(content, width)
    assert max(map(cell_len, printed.splitlines())) <= width
    for figure in [*FIGURES, "44 rows", "0.812", "(95% interval 0.703 to 0.922)"]:
        assert figure in _flat(printed), figure
    assert content["recommendation"] in _flat(printed)
    for finding in content["findings"]:
        assert f"{finding['level']}: {_flat(finding['finding'])[:40]}" in _flat(printed)


def test_a_wide_terminal_gets_no_wider_lines_and_little_histograms(content: dict[str, Any]) -> None:
    printed = _printed(content, 220)
    assert max(map(cell_len, printed.splitlines())) <= 100
    assert re.search(r"prompt +desirable .*█", printed)
    assert "█" not in _printed(content, 60)


def test_the_lengths_table_has_the_summaries(content: dict[str, Any]) -> None:
    found = content["lengths"]["completion"]["desirable"]
    printed = _printed(content, 100)
    values = [f"{found[key]:,.0f}" for key in ("mean", "median", "p95", "max")]
    assert re.search(r"completion +desirable +" + " +".join(values), printed)


def test_the_limit_asked_for_is_marked(content: dict[str, Any], text: str) -> None:
    asked = next(cut for cut in content["truncation"] if cut["asked"])
    row = re.search(r'<tr class="marked"><td class="number">8</td>(.*?)</tr>', text)
    assert row is not None
    cells = re.findall(r">([^<]*)</td>", row[1])
    assert cells[:3] == [str(asked["whole"]), str(asked["truncated"]), str(asked["refused"])]
    assert text.count('class="marked"') == 2  # the limit and the bounds


def test_the_recommendation_comes_first_then_findings(page: _Page, content: dict[str, Any]) -> None:
    places = [page.texts.index(words) for words in (content["recommendation"], "Findings", "Rows", "What UDM would do")]
    assert places == sorted(places)
    assert all(finding["finding"] in page.texts for finding in content["findings"])
    assert page.texts[0].startswith(f"logs/<{HEBREW}>")  # the title


def test_texts_of_the_log_are_only_texts(page: _Page, text: str, content: dict[str, Any]) -> None:
    assert "script" not in {tag for tag, _attrs in page.elements}
    assert sum('<script>alert("x")</script> [bold]w2[/bold]' in words for words in page.texts) >= 3
    assert "{{ name }} &amp;" in " ".join(page.texts)
    assert HEBREW in page.texts
    printed = _printed(content, 100)
    assert "\x1b" not in text + printed
    assert "[bold]w2[/bold]" in _flat(printed)


def test_texts_run_in_their_own_direction(text: str) -> None:
    assert f'<td class="text" dir="auto">{HEBREW}</td>' in text


def test_the_page_asks_for_nothing(page: _Page, text: str) -> None:
    assert not [value for key in ("src", "data", "action", "srcset") for value in page.all(key)]
    assert all(value.startswith("#") for value in page.all("href"))
    assert "http" not in text
    assert "@import" not in text
    assert "link" not in {tag for tag, _attrs in page.elements}


def test_names_are_unique_and_references_resolve(page: _Page, text: str) -> None:
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    referred = {value.removeprefix("#") for value in page.all("href")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert referred
    assert referred <= set(ids)


def test_plots_are_named_and_take_the_colours_of_the_page(page: _Page, text: str) -> None:
    labels = [attrs["aria-label"] for tag, attrs in page.elements if tag == "svg"]
    assert labels == [
        *("Tokens of the prompt", "Tokens of the completion", "Tokens of the whole row"),
        *("p(desirable | prompt), held out", "Density ratio of undesirable rows"),
    ]
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert {"var(--up)", "var(--down)", "var(--ratio)", "currentColor"} <= set(
        re.findall(r"var\(--\w+\)|cur\w+", drawn)
    )
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn, flags=re.IGNORECASE)) <= {"#000000"}
    assert "prefers-color-scheme: dark" in text
    assert "max_length 8" in page.texts


def test_a_set_with_one_class_and_equal_lengths_has_no_plots(tmp_path: Path) -> None:
    rows = {"prompt": ["w2 "] * 3, "completion": ["w3"] * 3, "label": [True] * 3, "example_id": [0, 1, 2]}
    inspection = inspect_rows(
        Dataset.from_dict(rows),
        tiny.tokenizer(),
        max_length=None,
        max_completion_length=None,
        truncation="drop",
        p_desirable=None,
        diagnostics=None,
        min_density_ratio=0.5,
        max_density_ratio=10.0,
        name="ups",
    )
    page = _Page(write_inspection_html(inspection.to_dict(), tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "svg" not in {tag for tag, _attrs in page.elements}
    assert "All 3 rows are desirable." in page.texts
    printed = _flat(_printed(inspection.to_dict(), 80))
    assert "stop: All 3 rows are desirable." in printed
    assert "completion undesirable – – – –" in printed
    assert "What UDM would do" not in printed


def test_prompts_that_cannot_be_compared_are_said_so(tmp_path: Path) -> None:
    known = UdmDiagnostics(44, 1, 22, 22, 8, reason="the rows share one prompt")
    content = _content(p_desirable=[0.5] * 44, diagnostics=known)
    page = _Page(write_inspection_html(content, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Not compared: the rows share one prompt." in page.texts
    assert "Nothing: every undesirable row would keep the weight 1." in page.texts
    assert "Density ratio of undesirable rows" not in page.texts


def test_a_page_replaces_an_older_one(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "inspection.html"
    path.write_text("old", encoding="utf-8")
    assert write_inspection_html(content, path) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_figures_make_the_same_page(tmp_path: Path, content: dict[str, Any], text: str) -> None:
    again = write_inspection_html(content, tmp_path / "again.html").read_text(encoding="utf-8")
    assert again == text
