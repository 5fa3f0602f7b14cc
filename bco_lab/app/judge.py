"""An independent judge of short texts: TF-IDF and logistic regression, fitted on rows no model was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline

MIN_ROWS = 20
_TINY = 200  # below this many training rows, words seen once are most of the vocabulary and are kept


@dataclass(frozen=True)
class Judge:
    """A fitted classifier together with how often it is right.

    Attributes:
        classifier: Maps a list of texts to bool labels, True = positive.
        accuracy: Share of its held-out rows on which the classifier is right.
        held_out: Number of those rows.
    """

    classifier: Pipeline
    accuracy: float
    held_out: int

    def positive(self, texts: Sequence[str]) -> list[bool]:
        """The verdict on each text, True = positive."""
        if not texts:
            return []
        return [bool(verdict) for verdict in self.classifier.predict(list(texts))]

    def share_positive(self, texts: Sequence[str]) -> float:
        """Share of the texts judged positive.

        Raises:
            ValueError: There are no texts, so there is no share.
        """
        if not texts:
            raise ValueError("cannot judge an empty list of texts")
        return sum(self.positive(texts)) / len(texts)


def fit_judge(texts: Sequence[str], labels: Sequence[bool], *, seed: int = 0, held_out_fraction: float = 0.2) -> Judge:
    """Fit a judge and measure it on a stratified part of the rows that it does not see.

    The judge is not refitted on all rows afterwards: the one whose accuracy is reported is the one that is used.

    Args:
        texts: One text per row.
        labels: True where the text is positive.
        seed: Decides which rows are held out.
        held_out_fraction: Share of the rows to hold out.

    Raises:
        ValueError: Lengths differ, fewer than 20 rows, fewer than two rows of a class, or a fraction that leaves
            either part without both classes.
    """
    verdicts = np.asarray([bool(label) for label in labels])
    _check_rows(texts, verdicts, held_out_fraction)
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        list(texts), verdicts, test_size=held_out_fraction, stratify=verdicts, random_state=seed
    )
    vectorizer = TfidfVectorizer(
        lowercase=True, ngram_range=(1, 2), sublinear_tf=True, min_df=2 if len(seen) >= _TINY else 1
    )
    classifier = make_pipeline(vectorizer, LogisticRegression(max_iter=1000))
    classifier.fit(seen, seen_labels)
    accuracy = float(np.mean(classifier.predict(unseen) == unseen_labels))
    return Judge(classifier=classifier, accuracy=accuracy, held_out=len(unseen))


def _check_rows(texts: Sequence[str], labels: np.ndarray, held_out_fraction: float) -> None:
    if len(texts) != len(labels):
        raise ValueError(f"the judge got {len(texts)} texts but {len(labels)} labels")
    if len(texts) < MIN_ROWS:
        raise ValueError(f"the judge needs at least {MIN_ROWS} rows to be fitted and measured, got {len(texts)}")
    positive = int(labels.sum())
    if min(positive, len(labels) - positive) < 2:
        raise ValueError(
            "the judge needs at least two rows of each class, "
            f"got {positive} positive and {len(labels) - positive} negative"
        )
    held_out = held_out_fraction * len(texts)
    if not 2 <= held_out <= len(texts) - 2:
        raise ValueError(
            f"held_out_fraction={held_out_fraction} of {len(texts)} rows must leave at least two rows on each side"
        )
