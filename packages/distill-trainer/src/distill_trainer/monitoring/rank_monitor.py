"""Ranks that check one another: they stay at the same place of the program, and fail as one."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from distill_protocols import RankError, RunState, StopFlag
from distill_runtime import Ranks
from torch import distributed

from distill_trainer.monitoring.status_store import RankStatus, StatusStore

_LOST_CONNECTION = re.compile(
    r"gloo/transport/|connection (?:closed|reset) by peer|failed to pass monitoredBarrier"
    r"|timeout caused pair closure|timed out waiting \d+ms",
    re.IGNORECASE,
)
"""What torch's message holds when another rank is gone, where it does not raise a ``DistError``."""

_LONGEST_ERROR = 2000
"""Characters of an error that other ranks get."""

_MOST_PLACES = 8
"""Different places of ranks that one message names."""

_SETTLING_SECONDS = 1.0


@contextlib.contextmanager
def monitor_ranks(run: RunState, timeout: float) -> Iterator[RankMonitor | None]:
    """Connect ``run.enter``, ``run.check_in_sync`` and a new ``method.stop`` to a ``RankMonitor``.

    All ranks must enter. The former stop flag is put back at the end.

    The monitor has a gloo group of its own: its checks come between others' collectives, must
    not wait for an accelerator, and must not be taken for somebody else's message.

    Args:
        timeout: seconds after which a rank that does not come is given up.

    Yields:
        None for a process alone, which has nobody to check and pays nothing.

    Raises:
        RankError: a rank does not come.
    """
    former = run.method.stop
    # A new group waits for all of its ranks, dead ones too, and does not show which one is missing;
    # the group that exists does.
    run.ranks.barrier()
    with Ranks.temporary(timeout) as ranks:
        monitor = None
        if ranks.group is not None:
            monitor = RankMonitor(run, ranks, StatusStore.connect(ranks))
            run.enter, run.check_in_sync = monitor.enter, monitor.check_in_sync
        run.method.stop = StopFlag(monitor and monitor.agree_on_stop)
        try:
            yield monitor
        finally:
            run.method.stop = former


class RankMonitor:
    """Publishes where this rank is, and finds out which ranks are elsewhere, or gone.

    A check is one all-reduce of three numbers. Ranks that check at different places all get a
    ``RankError`` with everybody's place, instead of taking each other's answers or waiting for
    ever. One that does not come, or whose connection breaks, in a check or in any collective of the
    run, is named with its place when it was last seen, and with its own error if it published one.
    """

    def __init__(self, run: RunState, ranks: Ranks, store: StatusStore) -> None:
        self._run = run
        self._ranks = ranks
        self._store = store
        self._statuses = self._checks = self._checks_in_phase = 0
        self._last_check = (self._place, time.monotonic())
        self._reported: BaseException | None = None
        self._publish()

    def enter(self, phase: str) -> None:
        """Set ``run.phase`` and publish that this rank does it from now on."""
        self._run.phase = phase
        self._checks_in_phase = 0
        self._publish()

    def check_in_sync(self, phase: str) -> None:
        """Enter ``phase``, and check that all others come there too.

        Raises:
            RankError: they do not.
        """
        self.enter(phase)
        self._check(self._ranks.size)

    def agree_on_stop(self, reason: str | None) -> str | None:
        """Check, and ask all ranks for a reason to stop.

        Returns:
            The reason of the first rank that has one, with its number; the same on all ranks.

        Raises:
            RankError: a rank does not come, or is elsewhere.
        """
        first = self._check(self._ranks.size if reason is None else self._ranks.rank)
        if first == self._ranks.size:
            return None
        # Texts are sent only after a stop: what each question costs is the all-reduce above.
        reasons = [f"{reason} (rank {first})"]
        with self._waiting_in_check():
            distributed.broadcast_object_list(reasons, group=self._ranks.group, group_src=first)
        return reasons[0]

    def finish(self) -> None:
        """Check for the last time: from here on ranks end when they are done, and with them the
        stores that they host."""
        self.check_in_sync("end of training")
        self._store.close()

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Surround the run: publish what fails here, and add what is known of the others.

        Raises:
            RankError: instead of what torch.distributed raises when another rank is gone.
        """
        try:
            yield
        # BaseException: Ctrl-C on one rank ends the others too.
        except BaseException as error:
            if error is self._reported:
                raise
            lost_others = _is_lost_rank(error)
            if lost_others and isinstance(error, RuntimeError | RankError):
                raise self._explain_loss(error, check=None) from error
            text = f"{type(error).__name__}: {error}".removesuffix(": ")[:_LONGEST_ERROR]
            now = time.time()
            statuses = self._store.exchange(self._new_status(text, lost_others=lost_others))
            error.add_note(
                f"rank {self._ranks.rank} of {self._ranks.size} was at {self._place}. The others: "
                + "; ".join(self._describe(statuses, self._others, now))
            )
            raise

    # -- inside -------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        return f"iteration {self._run.iteration}, {self._run.phase}"

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self._ranks.size) if rank != self._ranks.rank]

    def _new_status(self, error: str | None = None, *, lost_others: bool = False) -> RankStatus:
        self._statuses += 1
        return RankStatus(
            number=self._statuses, iteration=self._run.iteration, phase=self._run.phase,
            checks=self._checks, error=error, lost_others=lost_others,
        )  # fmt: skip

    def _publish(self) -> None:
        self._store.publish(self._new_status())

    def _check(self, own: int) -> int:
        """Check that all ranks are at this place; return the smallest of all ranks' ``own``."""
        self._checks += 1
        self._checks_in_phase += 1
        self._publish()
        here = f"{self._place} (check {self._checks_in_phase})"
        place_hash = int.from_bytes(blake2b(here.encode(), digest_size=7).digest())
        # One reduction gives max(hash), max(-hash) = -min(hash) and max(-own) = -min(own). All
        # hashes are equal exactly where the largest is the smallest. Were the place not part of
        # the very message that carries the answer, a rank that asks once too often would take the
        # others' answer to their next question for its own, and hang much later, elsewhere.
        numbers = torch.tensor([place_hash, -place_hash, -own])
        with self._waiting_in_check():
            distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._ranks.group)
            highest, negative_lowest, negative_least = numbers.tolist()
            if highest == -negative_lowest:
                self._last_check = (self._place, time.monotonic())
                return -negative_least
            # All ranks have seen the same numbers, so all come to this gather.
            places: list[Any] = [None] * self._ranks.size
            distributed.all_gather_object(places, here, group=self._ranks.group)
        # All ranks raise the same, and have nothing to add to it.
        self._reported = RankError(_message_of_places(places))
        raise self._reported

    @contextlib.contextmanager
    def _waiting_in_check(self) -> Iterator[None]:
        try:
            yield
        # Translated here and not in fail_together alone: code around the check (a method, a
        # callback) may take any RuntimeError for its own.
        except RuntimeError as error:
            raise self._explain_loss(error, check=self._checks) from error

    def _explain_loss(self, error: BaseException, *, check: int | None) -> RankError:
        """Make the error of a rank that lost others: which of them, where, and why.

        Args:
            check: number of the check that this rank waits in; None: it is in none.
        """
        reason = _first_line(error)
        now = time.time()
        status = self._new_status(f"lost the others ({reason})", lost_others=True)
        statuses = self._store.exchange(status)
        causes, blamed = self._find_causes(statuses, check, now)
        if len(blamed) > 1:
            # Other survivors find out at this moment too, and publish it. A second later those
            # that are still blamed are nearer to the ones that are really gone.
            time.sleep(_SETTLING_SECONDS)
            causes, blamed = self._find_causes(self._store.exchange(status), check, now)
        first = f" of {_name_ranks(blamed)}" if blamed else "s of the others"
        self._reported = RankError(
            f"rank {self._ranks.rank} waited for the others at {self._place} and lost them "
            f"({reason}): {causes.removesuffix('.')}. All ranks act together, so none goes on "
            f"alone. Read the log{first} first, then start all again and resume from the latest "
            "checkpoint; where a rank is only slow, raise DistributedConfig.timeout_seconds "
            f"({self._ranks.timeout:g})."
        )
        return self._reported

    def _find_causes(
        self, statuses: Mapping[int, RankStatus], check: int | None, now: float
    ) -> tuple[str, list[int]]:
        """Describe why the others are lost, and list the ranks to blame."""
        others = {rank: statuses[rank] for rank in self._others if rank in statuses}
        failed = [rank for rank, s in others.items() if s.error and not s.lost_others]
        if failed:
            return "; ".join(self._describe(others, failed, now)), failed
        running = [rank for rank, s in others.items() if not s.error]
        unknown = [rank for rank in self._others if rank not in others]
        if check is not None:
            # A rank that has begun this check too is waiting in it, like this one.
            running = [rank for rank in running if others[rank].checks < check]
        else:
            # Outside a check the number of statuses shows who fell behind: all publish alike.
            behind = [rank for rank in running if others[rank].number < self._statuses - 1]
            running = behind or running
        late = sorted([*running, *unknown])
        if late:
            what = "did not come" if check is not None else "did not answer"
            places = "; ".join(self._describe(others, late, now, f"{what}, "))
            if unknown:
                place, when = self._last_check
                places += f"; all were last together {time.monotonic() - when:.1f} s ago at {place}"
            return places, late
        gave_up = "; ".join(self._describe(others, list(others), now))
        return f"they gave this rank up: {gave_up}", [self._ranks.rank]

    def _describe(
        self, statuses: Mapping[int, RankStatus], ranks: Sequence[int], now: float, what: str = ""
    ) -> list[str]:
        """Describe what is known at ``now`` of ``ranks``; those that are alike share a line.

        Args:
            what: comes before the place of a rank that has published no error.
        """
        alike: dict[str, list[int]] = {}
        seconds: dict[str, float] = {}
        for rank in ranks:
            status = statuses.get(rank)
            text = f"{what}no word of it" if status is None else _describe_status(status, what)
            alike.setdefault(text, []).append(rank)
            if status is not None:
                # Clocks of two machines differ a little.
                seconds[text] = max(seconds.get(text, 0.0), now - status.time)
        lines = [
            f"{_name_ranks(group)} {text.replace('<ago>', f'{seconds.get(text, 0.0):.1f} s ago')}"
            for text, group in alike.items()
        ]
        rest = len(lines) - _MOST_PLACES
        return lines if rest <= 0 else [*lines[:_MOST_PLACES], f"and {rest} other places"]


def _message_of_places(places: Sequence[str]) -> str:
    by_place: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        by_place.setdefault(place, []).append(rank)
    groups = [f"{_name_ranks(ranks)} at {place}" for place, ranks in by_place.items()]
    return (
        f"the ranks are not at the same place: {', '.join(groups[:_MOST_PLACES])}. All ranks must "
        "do the same steps and ask for a stop equally often, because each question needs all of "
        "them. Search for what depends on the rank there: a loader with fewer batches, a "
        "stop.poll() in what one rank does alone, a callback that only some ranks have."
    )


def _describe_status(status: RankStatus, what: str) -> str:
    if status.error and not status.lost_others:
        return f"failed at {status.place} (<ago>): {status.error}"
    if status.error:
        return f"at {status.place} {status.error}, <ago>"
    return f"{what}last seen <ago> at {status.place}"


def _name_ranks(ranks: Sequence[int]) -> str:
    """Write ``rank 3`` or ``ranks 0, 2-5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _first_line(error: BaseException) -> str:
    # Without the place in torch's source, and without its advice.
    line = re.sub(r"^\[[^\]]*\]\s*", "", (str(error).splitlines() or [""])[0])
    return line.split(". ")[0] or type(error).__name__


def _is_lost_rank(error: BaseException | None) -> bool:
    """Tell whether ``error``, or one that it came from, is that another rank is gone."""
    while error is not None:
        if isinstance(error, distributed.DistError) or _LOST_CONNECTION.search(str(error)):
            return True
        error = error.__cause__
    return False
