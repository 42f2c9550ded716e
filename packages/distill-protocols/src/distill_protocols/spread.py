"""Work that can be cut into rows, spread over the processes of a run."""

from __future__ import annotations

import math

from attrs import frozen
from torch import Tensor, distributed

from distill_protocols.ranks import Ranks


@frozen(eq=False)
class Spread:
    """``count`` rows over ``ranks``: each takes as many, side by side, in the order of the ranks.

    As many, since a sharded model gathers in each of its calls, so that all ranks must make the
    same number of them. Where ``count`` does not divide, the last row is done more than once, and
    ``gather`` drops what is too much.

    Attributes:
        count: at least 1.
    """

    ranks: Ranks
    count: int

    @property
    def mine(self) -> list[int]:
        """The places of this rank's rows among all."""
        each = math.ceil(self.count / self.ranks.size)
        first = self.ranks.rank * each
        return [min(row, self.count - 1) for row in range(first, first + each)]

    def gather(self, rows: Tensor) -> Tensor | None:
        """All rows [count, ...] in their order, on rank 0 and on the CPU; elsewhere None.

        All ranks call it together.

        Args:
            rows: what came of ``mine``: [len(mine), ...], of one shape and type on all ranks.

        Raises:
            RankError: a rank died, or did not come within the timeout.
        """
        own = rows.detach().cpu().contiguous()
        if self.ranks.group is None:
            return own
        whole, parts = None, None
        if self.ranks.first:
            whole = own.new_empty((self.ranks.size * len(own), *own.shape[1:]))
            parts = list(whole.chunk(self.ranks.size))  # views: each is received in its place
        with self.ranks.in_time():
            distributed.gather(own, parts, group=self.ranks.group, group_dst=0)
        return None if whole is None else whole[: self.count]
