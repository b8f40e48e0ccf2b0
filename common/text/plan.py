"""The data order as a plan: which rows make up every update, and which of them a rank computes.

A pure function of seed, epoch and row lengths. Resuming is starting at a later update, with any number of processes as
long as the rows per update stay the same; no sampler state exists that could be lost.
"""

from collections.abc import Iterator, Sequence

import numpy as np

MEGA_BATCH = 32  # updates whose rows are sorted by length together: little padding, and still a random order


class Plan:
    """Row numbers of every update.

    lengths: tokens of each row. rows_per_update: per-device batch x accumulation x processes; the last update of an
    epoch may have fewer.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, rows_per_update: int, seed: int) -> None:
        self.lengths, self.rows_per_update, self.seed = np.asarray(lengths), rows_per_update, seed
        self.updates_per_epoch = -(-len(lengths) // rows_per_update)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The updates of one pass over all rows, each a list of row numbers, longest first."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        mega = MEGA_BATCH * self.rows_per_update
        updates = []
        for start in range(0, len(order), mega):
            rows = order[start : start + mega]
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            updates += [rows[i : i + self.rows_per_update].tolist() for i in range(0, len(rows), self.rows_per_update)]
        return [updates[i] for i in rng.permutation(len(updates))]

    def updates(self, start: int, stop: int) -> Iterator[list[int]]:
        """The updates number `start` to `stop - 1`, counted over all epochs."""
        for number in range(start, stop):
            epoch, position = divmod(number, self.updates_per_epoch)
            if number == start or position == 0:
                rows = self.epoch(epoch)
            yield rows[position]


def rank_share(rows: Sequence[int], batch: int, rank: int, world: int) -> list[list[tuple[int, bool]]]:
    """This rank's micro-batches of one update, as (row, counts) pairs.

    Ranks take every world-th row, so that their lengths agree. All ranks get equally many micro-batches; where a rank
    lacks a row, it repeats one that does not count.
    """
    share = [(row, True) for row in rows[rank::world]]
    longest = -(-len(rows) // world)
    share += [(rows[0], False)] * (longest - len(share))
    return [share[i : i + batch] for i in range(0, longest, batch)]
