"""Example weights out of known probabilities."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset

from bco_lab.data.labels import parse_label
from bco_lab.density_ratio import density_ratio

PROBABILITY = "p_desirable"
WEIGHT = "example_weight"


def with_density_ratio(
    dataset: Dataset | IterableDataset, *, min_density_ratio: float, max_density_ratio: float, name: str
) -> Dataset | IterableDataset:
    """Turn a column `p_desirable`, p(desirable | prompt), into `example_weight`; without that column nothing changes.

    Undesirable rows weigh the clamped density ratio p / (1 - p), desirable rows 1 (arXiv 2404.04656, section 4.3).

    Raises:
        ValueError: A probability outside [0, 1]; the message names data set and row.
    """
    if PROBABILITY not in (dataset.column_names or []):
        return dataset

    def weigh(row: dict[str, Any], index: int) -> dict[str, float]:
        try:
            ratio = density_ratio(torch.tensor(float(row[PROBABILITY])), min_density_ratio, max_density_ratio)
            return {WEIGHT: 1.0 if parse_label(row["label"]) else ratio.item()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}, row {index}, column {PROBABILITY}={row[PROBABILITY]!r}: {error}") from None

    return dataset.map(weigh, with_indices=True)
