"""`bco-lab cache`: what is kept, whether it is whole, and room for other things."""

import argparse
import time
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bco_lab.cache import ArtifactCache, Entry

_MIB = 2**20


def cache_command(arguments: Sequence[str]) -> None:
    """`bco-lab cache ls|verify|clear`.

    Raises:
        ValueError: `verify` found damaged artifacts; `clear` was given a kind that there is none of.
    """
    parser = argparse.ArgumentParser(
        prog="bco-lab cache",
        description="Prompt embeddings, probabilities, tokenised rows and reference log-probs that runs share. "
        "The folder is $BCO_LAB_CACHE/artifacts, else bco-lab/artifacts under the user's cache folder.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("ls", help="list what is kept")
    actions.add_parser("verify", help="read everything and compare checksums")
    clear = actions.add_parser("clear", help="delete what is kept; runs compute it again")
    clear.add_argument("kind", nargs="?", help="only artifacts of this kind, as ls names it")
    chosen = parser.parse_args(arguments)
    cache, console = ArtifactCache(), Console()
    entries = cache.entries()
    if chosen.action == "ls":
        _list(console, cache, entries)
    elif chosen.action == "verify":
        _verify(console, cache, entries)
    else:
        _clear(console, cache, entries, chosen.kind)


def _list(console: Console, cache: ArtifactCache, entries: Sequence[Entry]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("kind", "artifact"):
        table.add_column(name, no_wrap=True)
    for name in ("MiB", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        table.add_row(entry.kind, entry.digest[:12], f"{entry.size / _MIB:.1f}", _age(time.time() - entry.modified))
    if entries:
        console.print(table)
    console.print(f"{_amount(entries)} in {cache.root}", soft_wrap=True, highlight=False)


def _verify(console: Console, cache: ArtifactCache, entries: Sequence[Entry]) -> None:
    problems = [(entry, problem) for entry in entries if (problem := cache.problem_of(entry)) is not None]
    for entry, problem in problems:
        console.print(f"{entry.path}: {problem}", soft_wrap=True, highlight=False)
    if problems:
        raise ValueError(f"{len(problems)} of {len(entries)} artifacts are damaged; runs compute them anew")
    console.print(f"{_amount(entries)}, all whole", highlight=False)


def _clear(console: Console, cache: ArtifactCache, entries: Sequence[Entry], kind: str | None) -> None:
    chosen = [entry for entry in entries if kind in (None, entry.kind)]
    if kind is not None and not chosen:
        kinds = ", ".join(sorted({entry.kind for entry in entries})) or "nothing"
        raise ValueError(f"no artifact is of the kind {kind!r}; there is: {kinds}")
    for entry in chosen:
        cache.remove(entry)
    console.print(f"{_amount(chosen)} deleted", highlight=False)


def _amount(entries: Sequence[Entry]) -> str:
    noun = "artifact" if len(entries) == 1 else "artifacts"
    return f"{len(entries)} {noun}, {sum(entry.size for entry in entries) / _MIB:.1f} MiB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
