"""The data order: every row once an epoch, the same on every rank, restartable at any update."""

import numpy as np
import pytest

from common.text.plan import Plan, rank_share

LENGTHS = np.random.default_rng(0).integers(5, 200, 103).tolist()


def test_every_epoch_is_a_permutation_of_all_rows():
    """No row is dropped or repeated so that batches divide (fsdp_qlora's fault), and epochs differ."""
    plan = Plan(LENGTHS, 8, seed=1)
    orders = [[row for update in plan.epoch(epoch) for row in update] for epoch in range(3)]
    assert all(sorted(order) == list(range(103)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert len(plan.epoch(0)) == plan.updates_per_epoch == 13
    assert sorted(len(update) for update in plan.epoch(0)) == [7] + [8] * 12


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 257])
def test_number_of_updates(rows):
    plan = Plan([3] * rows, 8, seed=1)
    assert [len(plan.epoch(epoch)) for epoch in range(2)] == [plan.updates_per_epoch] * 2


def test_the_order_is_a_function_of_seed_epoch_and_lengths():
    """No hidden state: an equal plan gives an equal order, whatever was called before; a new seed, a new order."""
    plan = Plan(LENGTHS, 8, seed=1)
    plan.epoch(0)
    np.random.seed(5)
    assert plan.epoch(4) == Plan(LENGTHS, 8, seed=1).epoch(4)
    assert plan.epoch(4) != Plan(LENGTHS, 8, seed=2).epoch(4)


@pytest.mark.parametrize("start", [0, 5, 12, 13, 14, 26, 39])
def test_resuming_is_the_tail_of_the_plan(start):
    """Mid-epoch and at epoch boundaries."""
    whole = list(Plan(LENGTHS, 8, seed=1).updates(0, 39))
    assert list(Plan(LENGTHS, 8, seed=1).updates(start, 39)) == whole[start:]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13])
def test_ranks_partition_an_update(world, rows):
    """Every row counts on one rank only, and ranks run equally many micro-batches."""
    numbers = list(range(100, 100 + rows))
    shares = [rank_share(numbers, 4, rank, world) for rank in range(world)]
    pairs = [pair for share in shares for batch in share for pair in batch]
    assert sorted(row for row, counts in pairs if counts) == numbers
    assert {row for row, counts in pairs if not counts} <= set(numbers)
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1
    assert all(0 < len(batch) <= 4 for share in shares for batch in share)


def test_length_grouping_reduces_padding():
    def padding(updates):
        return sum(max(LENGTHS[row] for row in rows) * len(rows) for rows in updates) - sum(LENGTHS)

    shuffled = np.random.default_rng(1).permutation(len(LENGTHS)).tolist()
    assert padding(Plan(LENGTHS, 8, seed=1).epoch(0)) < 0.3 * padding(
        [shuffled[i : i + 8] for i in range(0, len(LENGTHS), 8)]
    )
