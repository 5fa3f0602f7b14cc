import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from bco_lab.steps import plan_step, reward_totals, true_rows

CPU = torch.device("cpu")


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


def test_thirteen_rows_in_batches_of_four_on_two_processes() -> None:
    # process 0: rows 0-3, then 8-11; process 1: rows 4-7, then 12 and three that fill up
    marks = {
        (process, batch): true_rows(4, batch, process, 2, 13).tolist() for process in range(2) for batch in range(2)
    }
    assert marks == {
        (0, 0): [True] * 4,
        (1, 0): [True] * 4,
        (0, 1): [True] * 4,
        (1, 1): [True, False, False, False],
    }


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 12, 13, 16, 17, 40])
@pytest.mark.parametrize(("batch_size", "processes"), [(4, 2), (3, 3), (1, 4), (5, 2)])
def test_every_row_of_an_epoch_counts_exactly_once_as_accelerate_deals_them(
    rows: int, batch_size: int, processes: int
) -> None:
    batches = BatchSampler(SequentialSampler(range(rows)), batch_size, drop_last=False)
    counted, dealt = [], 0
    for process in range(processes):
        for index, positions in enumerate(BatchSamplerShard(batches, processes, process)):
            mask = true_rows(len(positions), index, process, processes, rows).tolist()
            counted += [position for position, true in zip(positions, mask, strict=True) if true]
            dealt += len(positions)
    assert sorted(counted) == list(range(rows))
    assert dealt % (batch_size * processes) == 0


def test_plan_counts_true_rows_of_each_class_over_micro_batches() -> None:
    labels = [torch.tensor([True, False, False]), torch.tensor([True, True, False])]
    true = [torch.tensor([True, True, True]), torch.tensor([True, False, False])]
    step = plan_step(labels, true, CPU, alone)
    assert (step.desirable_count, step.undesirable_count, step.rows) == (2.0, 2.0, 4.0)
    assert step.totals.tolist() == [0.0] * 5
    assert step.totals.dtype == torch.float64
    assert step.true_rows is true


def test_plan_sums_over_processes() -> None:
    elsewhere = torch.tensor([5.0, 1.0])
    step = plan_step([torch.tensor([True, False])], [torch.ones(2, dtype=torch.bool)], CPU, lambda own: own + elsewhere)
    assert (step.desirable_count, step.undesirable_count) == (6.0, 2.0)


def test_a_step_is_finished_after_its_last_micro_batch() -> None:
    mask = torch.ones(1, dtype=torch.bool)
    step = plan_step([mask, mask], [mask, mask], CPU, alone)
    finished = []
    for _ in range(2):
        finished.append(step.finished)
        step.done += 1
    assert [*finished, step.finished] == [False, False, True]


def test_rows_is_a_divisor_also_without_rows() -> None:
    assert plan_step([], [], CPU, alone).rows == 1.0
    assert plan_step([torch.tensor([True])], [torch.tensor([False])], CPU, alone).rows == 1.0


def test_reward_totals_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    labels = torch.tensor([True, False, True, False, True])
    true = torch.tensor([True, True, True, True, False])
    totals = reward_totals(rewards, labels, true)
    assert totals.tolist() == [5.0, 2.0, 10.0, 2.0]
    assert totals.dtype == torch.float64
    assert not totals.requires_grad


def test_reward_totals_of_an_absent_class_are_zero() -> None:
    assert reward_totals(torch.tensor([3.0]), torch.tensor([False]), torch.tensor([True])).tolist() == [0, 0, 3, 1]


def test_reward_totals_keep_digits_that_float32_sums_lose() -> None:
    rewards = torch.tensor([2.0**25, 1.0, 1.0, 1.0])
    everything = torch.ones(4, dtype=torch.bool)
    assert reward_totals(rewards, everything, everything)[0].item() == 2.0**25 + 3
