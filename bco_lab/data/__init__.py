"""From feedback logs to batches: sources, pairs, labels, splits, tokenization, collation."""

from bco_lab.data.collation import FeedbackCollator
from bco_lab.data.labels import check_both_classes, parse_label
from bco_lab.data.pairs import unpair
from bco_lab.data.reviews import load_movie_reviews
from bco_lab.data.shapes import Paired, Rated, Unpaired
from bco_lab.data.sources import FeedbackData, FeedbackSource
from bco_lab.data.tokenization import TokenizationReport, tokenize_dataset

__all__ = [
    "FeedbackCollator",
    "FeedbackData",
    "FeedbackSource",
    "Paired",
    "Rated",
    "TokenizationReport",
    "Unpaired",
    "check_both_classes",
    "load_movie_reviews",
    "parse_label",
    "tokenize_dataset",
    "unpair",
]
