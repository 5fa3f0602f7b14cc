from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from bco_lab.data.weights import with_density_ratio

ROWS = [
    {"prompt": "a", "label": True, "p_desirable": 0.9},
    {"prompt": "b", "label": False, "p_desirable": 0.75},
    {"prompt": "c", "label": False, "p_desirable": 0.1},
    {"prompt": "d", "label": False, "p_desirable": 1.0},
    {"prompt": "e", "label": True, "p_desirable": 0.0},
]


def weigh(dataset: Any, low: float = 0.5, high: float = 10.0) -> Any:
    return with_density_ratio(dataset, min_density_ratio=low, max_density_ratio=high, name="train")


def test_undesirable_rows_weigh_the_clamped_ratio_and_desirable_rows_one() -> None:
    weighted = weigh(Dataset.from_list(ROWS))
    assert weighted["example_weight"] == pytest.approx([1.0, 3.0, 0.5, 10.0, 1.0])
    assert weighted["p_desirable"] == [0.9, 0.75, 0.1, 1.0, 0.0]
    assert weighted["prompt"] == list("abcde")


def test_a_weight_is_exact_where_the_probability_is_close_to_one() -> None:
    weighted = weigh(Dataset.from_list([{"label": False, "p_desirable": 0.999}]), high=1e4)
    assert weighted["example_weight"][0] == pytest.approx(999.0, rel=1e-9)


def test_new_bounds_clamp_again() -> None:
    dataset = Dataset.from_list(ROWS)
    assert weigh(weigh(dataset), 2.0, 2.5)["example_weight"] == pytest.approx([1.0, 2.5, 2.0, 2.5, 1.0])


def test_labels_are_read_as_everywhere_else() -> None:
    rows = [{"label": label, "p_desirable": 0.8} for label in ("up", "Down", "good", "👎")]
    assert weigh(Dataset.from_list(rows))["example_weight"] == pytest.approx([1.0, 4.0, 1.0, 4.0])
    rows = [{"label": label, "p_desirable": 0.8} for label in (1, 0, -1)]
    assert weigh(Dataset.from_list(rows))["example_weight"] == pytest.approx([1.0, 4.0, 4.0])


def test_without_probabilities_nothing_changes() -> None:
    dataset = Dataset.from_list([{"label": False, "example_weight": 7.0}])
    assert weigh(dataset)["example_weight"] == [7.0]
    assert weigh(dataset) is dataset


def test_a_stream_with_known_columns_is_weighed() -> None:
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    assert [row["example_weight"] for row in weigh(stream)] == pytest.approx([1.0, 3.0, 0.5, 10.0, 1.0])


def test_a_stream_that_does_not_know_its_columns_is_weighed() -> None:
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    assert stream.column_names is None
    assert [row.get("example_weight") for row in weigh(stream)] == pytest.approx([1.0, 3.0, 0.5, 10.0, 1.0])


@pytest.mark.parametrize(
    ("probability", "message"),
    [
        (1.5, r"1\.5: a probability of the desirable class must be in \[0, 1\]"),
        (-0.5, r"-0\.5: a probability of the desirable class must be in \[0, 1\]"),
        (float("nan"), r"nan: a probability of the desirable class must be in \[0, 1\]"),
        (None, r"None: .*NoneType"),
    ],
)
def test_a_bad_probability_names_data_set_row_and_column(probability: float | None, message: str) -> None:
    dataset = Dataset.from_list([ROWS[0], ROWS[1], {"prompt": "x", "label": True, "p_desirable": probability}])
    with pytest.raises(ValueError, match=rf"^train, row 2, column p_desirable={message}"):
        weigh(dataset)


def test_a_bad_label_is_not_blamed_on_the_probability() -> None:
    dataset = Dataset.from_list([{"label": "up", "p_desirable": 0.5}, {"label": "maybe", "p_desirable": 0.5}])
    with pytest.raises(ValueError, match=r"^train, row 1, column '?label'?.*maybe"):
        weigh(dataset)
