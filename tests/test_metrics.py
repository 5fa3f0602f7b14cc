import math
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from bco_lab.metrics import (
    COLUMNS,
    ExampleRecorder,
    ExampleTable,
    auc,
    drop_repeats,
    effective_sample_size,
    first_occurrence,
    summarize,
    wide_dtype,
)

CPU = torch.device("cpu")
NAN = float("nan")

# two desirable rows, three undesirable ones; a tie of rewards and a reward that equals its delta
BY_HAND: dict[str, list[Any]] = {
    "example_id": [10, 11, 12, 13, 14],
    "label": [True, False, True, False, False],
    "reward": [0.5, -0.3, -0.1, 0.2, -0.1],
    "logps": [-10.0, -20.0, -30.0, -5.0, -7.0],
    "ref_logps": [-11.0, -18.0, -29.0, -5.0, -3.0],
    "tokens": [4.0, 10.0, 6.0, 2.0, 3.0],
    "weight": [1.0, 0.5, 1.0, 2.0, 1.5],
    "delta": [0.0, 0.1, 0.0, 0.2, 0.1],
    "loss": [0.1, 0.2, 0.3, 0.4, 0.5],
}


def table(columns: dict[str, list[Any]]) -> ExampleTable:
    types = {"example_id": torch.int64, "label": torch.bool}
    return ExampleTable(**{k: torch.tensor(v, dtype=types.get(k, torch.float64)) for k, v in columns.items()})


def rows(ids: list[int], dtype: torch.dtype = torch.float32, **columns: list[float]) -> dict[str, Tensor]:
    made = {name: torch.arange(len(ids), dtype=dtype) + offset for offset, name in enumerate(COLUMNS)}
    made |= {"example_id": torch.tensor(ids), "label": torch.tensor([i % 2 == 0 for i in ids])}
    return made | {name: torch.tensor(values, dtype=dtype) for name, values in columns.items()}


def alone(values: Tensor) -> Tensor:
    return values


def test_summary_by_hand() -> None:
    assert summarize(table(BY_HAND)) == pytest.approx(
        {
            "rewards/chosen": 0.2,
            "rewards/rejected": -0.2 / 3,
            "rewards/margins": 0.2 + 0.2 / 3,
            "rewards/accuracies": 3.5 / 5,  # right, right, wrong, exactly delta, right
            "rewards/auc": 4.5 / 6,
            "logps/chosen": -20.0,
            "logps/rejected": -32 / 3,
            "delta": 0.08,
            "kl": 6 / 5,
            "kl_per_token": 6 / 25,
            "bound_gap": (math.exp(-0.5) + math.exp(0.1)) / 2 + (math.exp(-0.4) + 1.0 + math.exp(-0.2)) / 3,
            "count/chosen": 2.0,
            "count/rejected": 3.0,
            "udm/weight_mean": 4 / 3,
            "udm/ess": 16 / 6.5,
        },
        rel=1e-12,
    )


@pytest.mark.parametrize("label", [True, False])
def test_an_absent_class_is_nan_and_no_key_goes_missing(label: bool) -> None:
    metrics = summarize(table(BY_HAND | {"label": [label] * 5}))
    assert list(metrics) == list(summarize(table(BY_HAND)))
    absent = {"rewards/margins", "rewards/auc", "bound_gap"}
    absent |= (
        {"rewards/rejected", "logps/rejected", "udm/weight_mean", "udm/ess"}
        if label
        else {"rewards/chosen", "logps/chosen"}
    )
    assert {name for name, value in metrics.items() if math.isnan(value)} == absent
    assert (metrics["count/chosen"], metrics["count/rejected"]) == ((5.0, 0.0) if label else (0.0, 5.0))
    assert metrics["rewards/chosen" if label else "rewards/rejected"] == pytest.approx(0.2 / 5)
    assert metrics["kl"] == pytest.approx(1.2)


def test_without_rows_every_metric_but_the_counts_is_nan() -> None:
    metrics = summarize(table({name: [] for name in COLUMNS}))
    assert {name: value for name, value in metrics.items() if not math.isnan(value)} == {
        "count/chosen": 0.0,
        "count/rejected": 0.0,
    }


def test_bound_gap_stays_finite_where_rewards_explode() -> None:
    columns = BY_HAND | {"reward": [-1e6, -1e6, -1e6, -1e6, 1e6], "delta": [0.0] * 5}
    assert summarize(table(columns))["bound_gap"] == pytest.approx(math.exp(80) * (1 + 1 / 3))


def test_metrics_do_not_depend_on_the_order_of_rows() -> None:
    order = [3, 0, 4, 2, 1]
    shuffled = {name: [values[i] for i in order] for name, values in BY_HAND.items()}
    assert summarize(table(shuffled)) == pytest.approx(summarize(table(BY_HAND)), rel=1e-12)


@pytest.mark.parametrize("distinct", [2, 5, 1000000])
def test_auc_is_that_of_scikit_learn_with_and_without_ties(distinct: int) -> None:
    draw = torch.Generator().manual_seed(distinct)
    rewards = torch.randint(distinct, (501,), generator=draw).double() / 7
    labels = torch.rand(501, generator=draw) < 0.3
    rewards += 0.05 * labels
    assert auc(rewards, labels) == pytest.approx(roc_auc_score(labels.numpy(), rewards.numpy()), abs=1e-12)


def test_auc_at_its_ends() -> None:
    labels = torch.tensor([True, True, False, False])
    assert auc(torch.tensor([3.0, 2.0, 1.0, 0.0]), labels) == 1.0
    assert auc(torch.tensor([0.0, 1.0, 2.0, 3.0]), labels) == 0.0
    assert auc(torch.zeros(4), labels) == 0.5
    assert math.isnan(auc(torch.zeros(2), torch.tensor([True, True])))
    assert math.isnan(auc(torch.zeros(2), torch.tensor([False, False])))


def test_effective_sample_size_by_hand() -> None:
    assert effective_sample_size(torch.full((7,), 0.3, dtype=torch.float64)) == pytest.approx(7.0)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])) == 1.0
    assert effective_sample_size(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(36 / 14)
    assert math.isnan(effective_sample_size(torch.tensor([])))


def test_first_occurrence_marks_each_id_once() -> None:
    ids = torch.tensor([7, 3, 7, 5, 3, 3, 0])
    assert first_occurrence(ids).tolist() == [True, True, False, True, False, False, True]
    assert first_occurrence(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_drop_repeats_keeps_the_first_row_of_each_id_in_order() -> None:
    kept = drop_repeats(table(BY_HAND | {"example_id": [12, 10, 12, 11, 10]}))
    assert kept.example_id.tolist() == [12, 10, 11]
    assert kept.reward.tolist() == [0.5, -0.3, 0.2]
    assert kept.label.tolist() == [True, False, False]
    assert kept.loss.tolist() == [0.1, 0.2, 0.4]


def test_recorder_returns_rows_as_they_came_and_the_mean_auxiliary_loss() -> None:
    recorder = ExampleRecorder()
    recorder.add(rows([4, 1], reward=[0.25, -1.5]), torch.tensor(2.0))
    recorder.add(rows([2], reward=[3.0]), torch.tensor(5.0))
    assert len(recorder) == 3
    recorded, aux_loss = recorder.drain(CPU, alone)
    assert recorded.example_id.tolist() == [4, 1, 2]
    assert recorded.example_id.dtype == torch.int64
    assert recorded.label.tolist() == [True, False, True]
    assert recorded.reward.tolist() == [0.25, -1.5, 3.0]
    assert recorded.loss.tolist() == [8.0, 9.0, 8.0]
    assert recorded.weight.dtype == torch.float64
    assert aux_loss == 3.5


def test_draining_empties_the_recorder() -> None:
    recorder = ExampleRecorder()
    recorder.add(rows([4, 1]), torch.tensor(2.0))
    recorder.drain(CPU, alone)
    assert len(recorder) == 0
    recorded, aux_loss = recorder.drain(CPU, alone)
    assert [column.shape[0] for column in recorded] == [0] * len(COLUMNS)
    assert aux_loss is None
    recorder.add(rows([9]))
    assert recorder.drain(CPU, alone)[0].example_id.tolist() == [9]


def test_rows_and_auxiliary_losses_of_two_processes_travel_in_one_collective() -> None:
    first, second = ExampleRecorder(), ExampleRecorder()
    first.add(rows([0, 1]), torch.tensor(1.0))
    second.add(rows([2]), torch.tensor(2.0))
    second.add(rows([3, 4]), torch.tensor(6.0))
    sent: list[Tensor] = []
    second.drain(CPU, lambda values: sent.append(values) or values)
    recorded, aux_loss = first.drain(CPU, lambda values: torch.cat([values, *sent]))
    assert len(sent) == 1
    assert recorded.example_id.tolist() == [0, 1, 2, 3, 4]
    assert aux_loss == 3.0


def test_a_process_without_rows_still_takes_part() -> None:
    other = ExampleRecorder()
    other.add(rows([5]))
    sent: list[Tensor] = []
    other.drain(CPU, lambda values: sent.append(values) or values)
    recorded, aux_loss = ExampleRecorder().drain(CPU, lambda values: torch.cat([values, *sent]))
    assert recorded.example_id.tolist() == [5]
    assert aux_loss is None


def test_large_ids_and_small_digits_survive() -> None:
    recorder = ExampleRecorder()
    ids = [2**24 + 1, 2**40 + 1]  # neither fits into float32
    logps = [-1234.56787109375, 1 / 3]
    recorder.add(rows(ids, torch.float64, logps=logps))
    recorded, _ = recorder.drain(CPU, alone)
    assert recorded.example_id.tolist() == ids
    assert recorded.logps.tolist() == logps


def test_non_finite_rows_are_kept_for_whoever_reports_them() -> None:
    recorder = ExampleRecorder()
    recorder.add(rows([1, 2], reward=[NAN, 1.0], loss=[1.0, float("inf")]), torch.tensor(1.0))
    recorded, aux_loss = recorder.drain(CPU, alone)
    assert recorded.example_id.tolist() == [1, 2]
    assert torch.isnan(recorded.reward).tolist() == [True, False]
    assert torch.isinf(recorded.loss).tolist() == [False, True]
    assert aux_loss == 1.0


def test_what_is_recorded_holds_no_graph_and_no_later_change() -> None:
    recorder = ExampleRecorder()
    reward = torch.tensor([1.0, 2.0], requires_grad=True)
    columns = rows([1, 2]) | {"reward": reward * 2}
    recorder.add(columns)
    columns["reward"].detach().zero_()
    recorded, _ = recorder.drain(CPU, alone)
    assert recorded.reward.tolist() == [2.0, 4.0]
    assert not recorded.reward.requires_grad


def test_only_mps_is_left_with_float32() -> None:
    assert wide_dtype(torch.device("cuda")) == wide_dtype(CPU) == torch.float64
    assert wide_dtype(torch.device("mps")) == torch.float32
