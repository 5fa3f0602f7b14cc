import itertools
import random

import pytest

from bco_lab.data.splits import balanced_parts, can_split, group_split, permute_labels, stratified_sample


def test_single_rows_are_split_in_exact_proportion() -> None:
    labels = [True] * 30 + [False] * 70
    train, held_out = group_split(range(100), labels, eval_fraction=0.2, seed=0)
    assert len(train) == 80
    assert sum(labels[i] for i in held_out) == 6
    assert sum(not labels[i] for i in held_out) == 14
    assert sorted(train + held_out) == list(range(100))


def test_a_seed_gives_one_split_and_another_seed_another() -> None:
    labels = [i % 2 == 0 for i in range(60)]
    split = group_split(range(60), labels, eval_fraction=0.1, seed=1)
    assert group_split(range(60), labels, eval_fraction=0.1, seed=1) == split
    assert group_split(range(60), labels, eval_fraction=0.1, seed=2) != split


def test_no_group_straddles_and_shares_are_close() -> None:
    generator = random.Random(0)
    groups = [f"prompt {generator.randrange(50)}" for _ in range(400)]
    labels = [generator.random() < 0.3 for _ in groups]
    train, held_out = group_split(groups, labels, eval_fraction=0.25, seed=0)
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    assert sorted(train + held_out) == list(range(400))
    for label in (True, False):
        share = sum(labels[i] == label for i in held_out) / labels.count(label)
        assert share == pytest.approx(0.25, abs=0.04)


def test_both_sides_have_both_classes_exactly_when_some_partition_allows_it() -> None:
    generator = random.Random(0)
    seen = set()
    for seed in range(300):
        groups = [generator.randrange(4) for _ in range(generator.randrange(2, 8))]
        labels = [generator.random() < 0.5 for _ in groups]
        possible = any(
            len({labels[i] for i, group in enumerate(groups) if group in side}) == 2
            and len({labels[i] for i, group in enumerate(groups) if group not in side}) == 2
            for size in range(5)
            for side in itertools.combinations(range(4), size)
        )
        assert can_split(groups, labels) == possible
        train, held_out = group_split(groups, labels, eval_fraction=0.1, seed=seed)
        if possible:
            assert {labels[i] for i in train} == {labels[i] for i in held_out} == {True, False}
        elif len(set(labels)) == 2:
            assert {labels[i] for i in train} == {True, False}
        seen.add(possible)
    assert seen == {True, False}


def test_eval_fraction_zero_holds_out_nothing_and_others_must_be_shares() -> None:
    assert group_split("abc", [True, False, True], eval_fraction=0, seed=0) == ([0, 1, 2], [])
    for fraction in (1.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"eval_fraction={fraction} must be in \[0, 1\)"):
            group_split("abc", [True, False, True], eval_fraction=fraction, seed=0)


def test_balanced_parts_are_disjoint_and_half_desirable() -> None:
    labels = [True] * 50 + [False] * 20
    first, second, rest = balanced_parts(labels, [10, 5, None], seed=0)
    assert [len(first), len(second), len(rest)] == [10, 5, 26]  # 20 - 5 - 2 = 13 undesirable rows are left for the rest
    assert [sum(labels[i] for i in part) for part in (first, second, rest)] == [5, 3, 13]
    assert len({*first, *second, *rest}) == 41


def test_a_balanced_part_does_not_depend_on_later_ones() -> None:
    labels = [i % 2 == 0 for i in range(100)]
    assert balanced_parts(labels, [10, 20], seed=3)[0] == balanced_parts(labels, [10, None, 0], seed=3)[0]
    assert balanced_parts(labels, [10], seed=4)[0] != balanced_parts(labels, [10], seed=3)[0]


def test_balanced_parts_refuse_more_rows_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"^3 rows labelled False are wanted, 2 are left$"):
        balanced_parts([True] * 5 + [False] * 2, [6], seed=0)


def test_stratified_sample_keeps_shares_and_both_classes() -> None:
    labels = [True] * 90 + [False] * 10
    chosen = stratified_sample(labels, 20, seed=0)
    assert chosen == sorted(set(chosen))
    assert [sum(labels[i] for i in chosen), len(chosen)] == [18, 20]
    assert sum(labels[i] for i in stratified_sample(labels, 2, seed=0)) == 1
    assert stratified_sample(labels, 500, seed=0) == list(range(100))
    assert stratified_sample(labels, 20, seed=1) != chosen


@pytest.mark.parametrize(("desirable", "undesirable", "kept"), [(50, 50, 25), (30, 10, 22), (3, 0, 3), (1, 4, 0)])
def test_permuted_labels_keep_the_counts_and_say_nothing_of_the_truth(
    desirable: int, undesirable: int, kept: int
) -> None:
    labels = [True] * desirable + [False] * undesirable
    permuted = permute_labels(labels, seed=0)
    assert sum(permuted) == desirable
    assert sum(permuted[:desirable]) == kept


def test_permuted_labels_depend_on_the_seed_alone() -> None:
    labels = [True, False] * 50
    assert permute_labels(labels, seed=0) == permute_labels(labels, seed=0) != permute_labels(labels, seed=1)
