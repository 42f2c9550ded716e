"""Work that can be cut into rows, divided among the processes of a run."""

from __future__ import annotations

import math

from attrs import frozen
from distill_protocols import RankGroup
from torch import Tensor, distributed


@frozen(eq=False)
class RowPartition:
    """``count`` rows over ``ranks``: each takes as many, side by side, in the order of the ranks.

    As many, since a sharded model gathers in each of its calls, so that all ranks must make the
    same number of them. Where ``count`` does not divide, the last row is done more than once, and
    ``gather`` drops what is too much.

    Attributes:
        count: at least 1.
    """

    ranks: RankGroup
    count: int

    @property
    def own(self) -> list[int]:
        """The places of this rank's rows among all."""
        each = math.ceil(self.count / self.ranks.size)
        first = self.ranks.rank * each
        return [min(row, self.count - 1) for row in range(first, first + each)]

    def gather(self, rows: Tensor) -> Tensor | None:
        """Return all rows [count, ...] in their order, on rank 0 and on the CPU; elsewhere None.

        All ranks call it together.

        Args:
            rows: the results of ``own``: [len(own), ...], of one shape and type on all ranks.

        Raises:
            RankError: a rank died, or did not come within the timeout.
        """
        sent = rows.detach().cpu().contiguous()
        if self.ranks.group is None:
            return sent
        whole, parts = None, None
        if self.ranks.is_first:
            whole = sent.new_empty((self.ranks.size * len(sent), *sent.shape[1:]))
            parts = list(whole.chunk(self.ranks.size))  # views: each is received in its place
        with self.ranks.within_timeout():
            distributed.gather(sent, parts, group=self.ranks.group, group_dst=0)
        return None if whole is None else whole[: self.count]
