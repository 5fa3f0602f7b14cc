"""Seeded choices of rows: which train, which evaluate. Pure functions of labels, returning row numbers."""

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class _Group:
    """Rows that must stay together."""

    rows: tuple[int, ...]
    desirable: int
    undesirable: int


def group_split(
    groups: Sequence[Hashable], labels: Sequence[bool], *, eval_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split rows in two so that no group is in both parts and both parts have about the same share of each class.

    Both parts hold both classes whenever some partition of the groups allows it, even where that makes the second
    part larger than asked. Where none does, the first part is the one that keeps both.

    Args:
        groups: What must not straddle the split, such as the prompt, one per row.
        labels: One per row.
        eval_fraction: Wanted share of the second part, in [0, 1).
        seed: Equal seeds give equal splits.

    Returns:
        Row numbers of the first and of the second part, ascending.

    Raises:
        ValueError: `eval_fraction` is outside [0, 1).
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction={eval_fraction} must be in [0, 1)")
    if eval_fraction == 0:
        return list(range(len(labels))), []
    members = _collect(groups, labels)
    random.Random(seed).shuffle(members)
    # Small groups first where a side needs one of each class: a large one would overshoot the wanted share.
    candidates = sorted(members, key=lambda group: len(group.rows))
    second = _one_of_each(candidates)
    first = _one_of_each([group for group in candidates if group not in second])
    if not first:  # both sides cannot have both classes
        first, second = second, []

    reserved = {*first, *second}
    missing_desirable = eval_fraction * sum(labels) - sum(group.desirable for group in second)
    missing_undesirable = eval_fraction * (len(labels) - sum(labels)) - sum(group.undesirable for group in second)
    for group in members:
        short_by = (missing_desirable - group.desirable, missing_undesirable - group.undesirable)
        closer = short_by[0] ** 2 + short_by[1] ** 2 < missing_desirable**2 + missing_undesirable**2
        if closer and group not in reserved:
            second.append(group)
            missing_desirable, missing_undesirable = short_by
    held_out = {row for group in second for row in group.rows}
    return [row for row in range(len(labels)) if row not in held_out], sorted(held_out)


def can_split(groups: Sequence[Hashable], labels: Sequence[bool]) -> bool:
    """Whether the groups can be parted in two so that each part has both classes."""
    members = _collect(groups, labels)
    mixed = sum(1 for group in members if group.desirable and group.undesirable)
    desirable_only = sum(1 for group in members if not group.undesirable)
    undesirable_only = sum(1 for group in members if not group.desirable)
    return mixed + min(desirable_only, undesirable_only) >= 2


def balanced_parts(labels: Sequence[bool], sizes: Sequence[int | None], *, seed: int) -> list[list[int]]:
    """Disjoint random parts, each half desirable and half undesirable (an odd one has one more desirable row).

    A part does not change with the sizes of the parts after it.

    Args:
        labels: One per row.
        sizes: Rows per part; None takes as many as the rows left allow, balanced.
        seed: Equal seeds give equal parts.

    Returns:
        Row numbers per part, in random order.

    Raises:
        ValueError: A part asks for more rows of a class than are left.
    """
    generator = random.Random(seed)
    left = {label: [row for row, value in enumerate(labels) if bool(value) == label] for label in (True, False)}
    for rows in left.values():
        generator.shuffle(rows)
    parts: list[list[int]] = []
    for size in sizes:
        if size is None:
            size = 2 * min(len(left[True]), len(left[False]))
        part = []
        for label, count in ((True, size - size // 2), (False, size // 2)):
            if count > len(left[label]):
                raise ValueError(f"{count} rows labelled {label} are wanted, {len(left[label])} are left")
            part += left[label][:count]
            del left[label][:count]
        # Of its own seed: the order of one part must not depend on the size of another.
        random.Random(f"{seed}/{len(parts)}").shuffle(part)
        parts.append(part)
    return parts


def stratified_sample(labels: Sequence[bool], size: int, *, seed: int) -> list[int]:
    """Row numbers, ascending, of a random sample that keeps the share of each class, and both classes if `size` > 1."""
    if size >= len(labels):
        return list(range(len(labels)))
    rows = {label: [row for row, value in enumerate(labels) if bool(value) == label] for label in (True, False)}
    wanted = round(size * len(rows[True]) / len(labels))
    if size > 1 and rows[True] and rows[False]:
        wanted = min(max(wanted, 1), size - 1)
    generator = random.Random(seed)
    return sorted(generator.sample(rows[True], wanted) + generator.sample(rows[False], size - wanted))


def permute_labels(labels: Sequence[bool], *, seed: int) -> list[bool]:
    """The same labels dealt out anew, the same share to each true class: a control in which a label says nothing.

    A plain shuffle of a few hundred labels keeps a chance correlation with the truth, of about 1/sqrt(rows) either way,
    and a model learns that much. Here the correlation is 0, to the nearest row.
    """
    given: list[bool] = [bool(label) for label in labels]
    rows = {label: [row for row, value in enumerate(given) if value == label] for label in (True, False)}
    generator = random.Random(seed)
    permuted = [False] * len(given)
    kept = round(len(rows[True]) ** 2 / max(1, len(given)))
    for row in generator.sample(rows[True], kept) + generator.sample(rows[False], len(rows[True]) - kept):
        permuted[row] = True
    return permuted


def oversample(labels: Sequence[bool], *, seed: int) -> list[tuple[int, int]]:
    """Row numbers to repeat, with the number of the copy, until both classes have as many rows.

    Each row of the smaller class is repeated as often as any other, or once more.
    """
    rows: dict[bool, list[int]] = {
        value: [i for i, label in enumerate(labels) if bool(label) == value] for value in (True, False)
    }
    smaller, larger = sorted(rows.values(), key=len)
    if not smaller:
        return []
    generator = random.Random(seed)
    copies: list[tuple[int, int]] = []
    number = 0
    while (missing := len(larger) - len(smaller) - len(copies)) > 0:
        number += 1
        copies += [(row, number) for row in sorted(generator.sample(smaller, min(missing, len(smaller))))]
    return copies


def _collect(groups: Sequence[Hashable], labels: Sequence[bool]) -> list[_Group]:
    """Rows gathered by group, in order of first appearance."""
    rows_of: defaultdict[Hashable, list[int]] = defaultdict(list)
    for row, key in enumerate(groups):
        rows_of[key].append(row)
    collected = []
    for rows in rows_of.values():
        desirable = sum(1 for row in rows if labels[row])
        collected.append(_Group(tuple(rows), desirable, len(rows) - desirable))
    return collected


def _one_of_each(groups: Sequence[_Group]) -> list[_Group]:
    """The fewest rows that hold both classes, of groups ordered by size: one mixed group or two; empty if none do."""
    desirable = [group for group in groups if not group.undesirable][:1]
    undesirable = [group for group in groups if not group.desirable][:1]
    mixed = [group for group in groups if group.desirable and group.undesirable][:1]
    choices = ([desirable + undesirable] if desirable and undesirable else []) + ([mixed] if mixed else [])
    return min(choices, key=lambda choice: sum(len(group.rows) for group in choice), default=[])
