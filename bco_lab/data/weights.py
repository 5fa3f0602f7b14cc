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
    columns = dataset.column_names
    if columns is None:  # a stream that has not said yet
        columns = list(next(iter(dataset), {}))
    if PROBABILITY not in columns:
        return dataset

    def weigh(row: dict[str, Any], index: int) -> dict[str, float]:
        try:
            desirable = parse_label(row["label"])
        except ValueError as error:
            raise ValueError(f"{name}, row {index}, column 'label': {error}") from None
        try:
            p = torch.tensor(float(row[PROBABILITY]), dtype=torch.float64)
            ratio = density_ratio(p, min_density_ratio, max_density_ratio).item()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}, row {index}, column {PROBABILITY}={row[PROBABILITY]!r}: {error}") from None
        return {WEIGHT: 1.0 if desirable else ratio}

    return dataset.map(weigh, with_indices=True)
