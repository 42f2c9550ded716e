"""The ranks of a run in step: they look after one another, and fail as one."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from distill_protocols import RankError, RunState, StopFlag
from distill_runtime import Ranks
from torch import distributed

from distill_trainer.boards import Boards, Note

_CONNECTION = re.compile(
    r"gloo/transport/|connection (?:closed|reset) by peer|failed to pass monitoredBarrier"
    r"|timeout caused pair closure|timed out waiting \d+ms",
    re.IGNORECASE,
)
"""What torch says when another rank is gone, where it does not say so with a ``DistError``."""

_LONGEST_ERROR = 2000
_MOST_PLACES = 8
_SETTLING_SECONDS = 1.0


@contextlib.contextmanager
def in_step(run: RunState, timeout: float) -> Iterator[Lockstep | None]:
    """Within: ``run.enter``, ``run.check_in_sync`` and the questions of a new ``method.stop``
    (the former flag is put back after) keep the ranks of the run in step. All ranks must enter.

    They ask over a gloo group of their own: such questions come between others' collectives, must
    not wait for an accelerator, and must not be taken for someone else's message.

    Args:
        timeout: seconds after which a rank that does not come is given up.

    Yields:
        None for a process alone, which has nobody to ask and pays nothing.

    Raises:
        RankError: a rank does not come.
    """
    former = run.method.stop
    # A new group waits for all of its ranks, dead ones too: the one that is there tells of these.
    run.ranks.barrier()
    with Ranks.temporary(timeout) as ranks:
        lockstep = None if ranks.group is None else Lockstep(run, ranks, Boards.of(ranks))
        run.method.stop = StopFlag(lockstep and lockstep.ask)
        if lockstep is not None:
            run.enter, run.check_in_sync = lockstep.enter, lockstep.meet
        try:
            yield lockstep
        finally:
            run.method.stop = former


class Lockstep:
    """Notes where this rank is, and finds out who is elsewhere, or nowhere.

    A look is one all-reduce of three numbers. Ranks that look at different places all get a
    ``RankError`` with everybody's place, instead of taking each other's answers or waiting for
    ever. One that does not come, or whose connection breaks, in a look or in any collective of the
    run, is named with its place when it was last seen, and with its own error if it told one.
    """

    def __init__(self, run: RunState, ranks: Ranks, boards: Boards) -> None:
        self._run = run
        self._ranks = ranks
        self._boards = boards
        self._phase = "start of the run"
        self._notes = self._looks = self._looks_here = 0
        self._last_look = (self._place, time.monotonic())
        self._explained: BaseException | None = None
        self._pin()

    def enter(self, phase: str) -> None:
        """This rank does ``phase`` from now on."""
        self._phase = phase
        self._looks_here = 0
        self._pin()

    def meet(self, phase: str) -> None:
        """``enter``, and look whether all others come there too.

        Raises:
            RankError: they do not.
        """
        self.enter(phase)
        self._look(self._ranks.size)

    def ask(self, reason: str | None) -> str | None:
        """A look, and the question of the stop flag: the reason of the first rank that has one,
        with its number; the same on all ranks.

        Raises:
            RankError: a rank does not come, or is elsewhere.
        """
        first = self._look(self._ranks.size if reason is None else self._ranks.rank)
        if first == self._ranks.size:
            return None
        told = [f"{reason} (rank {first})"]
        with self._waiting():
            distributed.broadcast_object_list(told, group=self._ranks.group, group_src=first)
        return told[0]

    def ending(self) -> None:
        """The last look: from here on ranks end when they have done, each with its board."""
        self.meet("end of training")
        self._boards.close()

    @contextlib.contextmanager
    def failing_as_one(self) -> Iterator[None]:
        """Around the run: what fails here is told to the others, and what they know is added.

        Raises:
            RankError: instead of what torch.distributed raises when another rank is gone.
        """
        try:
            yield
        # BaseException: Ctrl-C on one rank ends the others too.
        except BaseException as error:
            if error is self._explained:
                raise
            if _is_loss(error) and isinstance(error, RuntimeError | RankError):
                raise self._lost(error, came=None) from error
            said = f"{type(error).__name__}: {error}".removesuffix(": ")[:_LONGEST_ERROR]
            now = time.time()
            notes = self._boards.exchange(self._note(said, lost=_is_loss(error)))
            error.add_note(
                f"rank {self._ranks.rank} of {self._ranks.size} was at {self._place}. The others: "
                + "; ".join(self._places(notes, self._others, now))
            )
            raise

    # -- inside -------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        return f"iteration {self._run.iteration}, {self._phase}"

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self._ranks.size) if rank != self._ranks.rank]

    def _note(self, error: str | None = None, *, lost: bool = False) -> Note:
        self._notes += 1
        return Note(
            number=self._notes, iteration=self._run.iteration, phase=self._phase,
            looks=self._looks, error=error, lost=lost,
        )  # fmt: skip

    def _pin(self) -> None:
        self._boards.pin(self._note())

    def _look(self, mine: int) -> int:
        """The smallest of all ranks' ``mine``."""
        self._looks += 1
        self._looks_here += 1
        self._pin()
        here = f"{self._place} (look {self._looks_here})"
        code = int.from_bytes(blake2b(here.encode(), digest_size=7).digest())
        # Of the code its largest and its smallest, by one reduction.
        seen = torch.tensor([code, -code, -mine])
        with self._waiting():
            distributed.all_reduce(seen, distributed.ReduceOp.MAX, group=self._ranks.group)
            highest, lowest, least = seen.tolist()
            if highest == -lowest:
                self._last_look = (self._place, time.monotonic())
                return -least
            places: list[Any] = [None] * self._ranks.size
            distributed.all_gather_object(places, here, group=self._ranks.group)
        # All ranks raise the same, and have nothing to add to it.
        self._explained = RankError(_apart(places))
        raise self._explained

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        # At once, as what is around (a method, a callback) may take any RuntimeError for its own.
        except RuntimeError as error:
            raise self._lost(error, came=self._looks) from error

    def _lost(self, error: BaseException, *, came: int | None) -> RankError:
        """Args:
        came: the number of the look that this rank waits in; None: it is in none.
        """
        said = _first_line(error)
        now = time.time()
        note = self._note(f"lost the others ({said})", lost=True)
        notes = self._boards.exchange(note)
        causes, blamed = self._causes(notes, came, now)
        if len(blamed) > 1:
            # Others that live find out now too, and say so: what is left then is nearer the truth.
            time.sleep(_SETTLING_SECONDS)
            causes, blamed = self._causes(self._boards.exchange(note), came, now)
        first = f" of {_named(blamed)}" if blamed else "s of the others"
        self._explained = RankError(
            f"rank {self._ranks.rank} waited for the others at {self._place} and lost them "
            f"({said}): {causes.removesuffix('.')}. All ranks act together, so none goes on "
            f"alone. Look at the log{first} first, then start all again with checkpoint.resume: "
            "latest; where a rank is only slow, raise training.distributed.timeout_seconds "
            f"({self._ranks.timeout:g})."
        )
        return self._explained

    def _causes(
        self, notes: Mapping[int, Note], came: int | None, now: float
    ) -> tuple[str, list[int]]:
        """(what is known of the others, ranks at problem)."""
        others = {rank: notes[rank] for rank in self._others if rank in notes}
        failed = [rank for rank, note in others.items() if note.error and not note.lost]
        if failed:
            return "; ".join(self._places(others, failed, now)), failed
        going = [rank for rank, note in others.items() if not note.error]
        unheard = [rank for rank in self._others if rank not in others]
        if came is not None:
            going = [rank for rank in going if others[rank].looks < came]
        else:
            behind = [rank for rank in going if others[rank].number < self._notes - 1]
            going = behind or going
        late = sorted([*going, *unheard])
        if late:
            what = "did not come" if came is not None else "did not answer"
            places = "; ".join(self._places(others, late, now, f"{what}, "))
            if unheard:
                place, when = self._last_look
                places += f"; all were last together {time.monotonic() - when:.1f} s ago at {place}"
            return places, late
        given_up = "; ".join(self._places(others, list(others), now))
        return f"they gave this rank up: {given_up}", [self._ranks.rank]

    def _places(
        self, notes: Mapping[int, Note], which: Sequence[int], now: float, what: str = ""
    ) -> list[str]:
        """What is known at ``now`` of ``which`` (``what`` of those that are still at it), those
        that are alike together."""
        alike: dict[str, list[int]] = {}
        seconds: dict[str, float] = {}
        for rank in which:
            note = notes.get(rank)
            text = f"{what}no word of it" if note is None else _said(note, what)
            alike.setdefault(text, []).append(rank)
            if note is not None:
                # Clocks of two machines differ a little.
                seconds[text] = max(seconds.get(text, 0.0), now - note.time)
        told = [
            f"{_named(ranks)} {text.replace('<ago>', f'{seconds.get(text, 0.0):.1f} s ago')}"
            for text, ranks in alike.items()
        ]
        rest = len(told) - _MOST_PLACES
        return told if rest <= 0 else [*told[:_MOST_PLACES], f"and {rest} other places"]


def check_same_run(ranks: Ranks, resolved: Mapping[str, Any]) -> None:
    """Every rank calls it with its run file as resolved (JSON-able), before anything is built.

    Raises:
        RankError: they are not the same: on all ranks, which differ from rank 0 and where.
    """
    text = json.dumps(resolved, sort_keys=True)
    if not ranks.ranks_that_differ(blake2b(text.encode()).hexdigest()):
        return
    runs = [dict(_leaves(run)) for run in ranks.gather_results(lambda: resolved)]
    problems = []
    for rank, run in enumerate(runs):
        keys = [key for key in runs[0] | run if runs[0].get(key) != run.get(key)]
        if keys:
            some = ", ".join(
                f"{key}: {_value(run, key)} (rank 0: {_value(runs[0], key)})" for key in keys[:5]
            )
            more = f" and {len(keys) - 5} more keys" if len(keys) > 5 else ""
            problems.append(f"rank {rank} differs from rank 0 in {some}{more}")
    raise RankError(
        f"{'; '.join(problems)}. All ranks must have the same run, because each holds a part of "
        "it. Start all ranks with the same run file and the same overrides."
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _value(run: Mapping[str, Any], key: str) -> str:
    return repr(run[key]) if key in run else "absent"


def _apart(places: Sequence[str]) -> str:
    by_place: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        by_place.setdefault(place, []).append(rank)
    told = [f"{_named(ranks)} at {place}" for place, ranks in by_place.items()]
    return (
        f"the ranks are not at the same place: {', '.join(told[:_MOST_PLACES])}. All ranks must do "
        "the same steps and ask for a stop equally often, because each question needs all of them. "
        "Look for what depends on the rank there: a loader with fewer batches, a stop.poll() in "
        "what one rank does alone, a callback that only some ranks have."
    )


def _said(note: Note, what: str) -> str:
    if note.error and not note.lost:
        return f"failed at {note.place} (<ago>): {note.error}"
    if note.error:
        return f"at {note.place} {note.error}, <ago>"
    return f"{what}last seen <ago> at {note.place}"


def _named(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0, 2-5``."""
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


def _is_loss(error: BaseException | None) -> bool:
    """Whether another rank's end is behind ``error``."""
    while error is not None:
        if isinstance(error, distributed.DistError) or _CONNECTION.search(str(error)):
            return True
        error = error.__cause__
    return False
