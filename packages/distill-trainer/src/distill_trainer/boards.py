"""Where each rank pins up where it is, for the others to read when they have lost it."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import attrs
from attrs import frozen
from distill_runtime import Ranks
from torch import distributed
from torch.distributed import TCPStore

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
"""For which the first board is waited for; one that is alive answers in a millisecond."""

_SECOND_ANSWER_SECONDS = 1.0
"""For which the other one is, which knows the same, but for ranks that reached only one."""


@frozen(kw_only=True)
class Note:
    """What a rank says of itself.

    Attributes:
        number: of its notes; the newest has the largest.
        iteration, phase: where it is.
        looks: how often it has come to where all look after one another.
        time: Unix seconds of the note.
        error: why it ends; None: it goes on.
        lost: that error is only that it lost another rank.
    """

    number: int
    iteration: int
    phase: str
    looks: int
    time: float = attrs.field(factory=time.time)
    error: str | None = None
    lost: bool = False

    @property
    def place(self) -> str:
        return f"iteration {self.iteration}, {self.phase}"


class Boards:
    """Two key-value stores with everybody's newest note, on the first and on the last rank.

    Two, so that a rank that dies never takes all of them with it; of these two in most clusters
    each is another machine's. Pinning up a note is one message that nobody answers, so that it
    costs microseconds and waits for nobody, dead or stopped. Only ``exchange`` waits, and not for
    long. A board that fails is left out from then on: it must never hide what is wrong.
    """

    def __init__(self, rank: int, size: int, stores: Sequence[TCPStore]) -> None:
        self._rank = rank
        self._size = size
        self._stores = list(stores)
        self._open = True

    @classmethod
    def of(cls, ranks: Ranks) -> Boards:
        """All ranks call it together.

        Raises:
            RankError: one of them does not come.
        """
        timeout = timedelta(seconds=min(_ANSWER_SECONDS, ranks.timeout))
        own = _hosted(timeout) if ranks.rank in (0, ranks.size - 1) else None
        told = ranks.gather_results(lambda: (socket.gethostname(), own and own.port))
        # Names need not be known to a resolver where all are on one machine.
        alone = len({name for name, _ in told}) == 1
        stores = []
        for rank, (name, port) in enumerate(told):
            if rank == ranks.rank and own is not None:
                stores.append(own)
            elif port is not None:
                stores += _reached("127.0.0.1" if alone else name, port, timeout)
        return cls(ranks.rank, ranks.size, stores)

    def pin(self, note: Note) -> None:
        """Put ``note`` in the place of this rank's last one."""
        if self._open:
            text = json.dumps(attrs.asdict(note))
            for store in tuple(self._stores):
                try:
                    store.set(str(self._rank), text)
                except RuntimeError:
                    self._stores.remove(store)

    def close(self) -> None:
        """Pin up no more: from now on ranks end, and their boards with them."""
        self._open = False

    def exchange(self, note: Note) -> Mapping[int, Note]:
        """Pin ``note`` up, surely; the newest of every rank, as far as a board answers."""
        answers: queue.SimpleQueue[tuple[TCPStore, Mapping[int, Note]]] = queue.SimpleQueue()

        def ask(store: TCPStore) -> None:
            try:
                # In one connection's order: whoever gets an answer has been heard.
                store.set(str(self._rank), json.dumps(attrs.asdict(note)))
                answers.put((store, _read(store, self._size)))
            except RuntimeError as error:
                _log.debug("a board does not answer: %s", error)

        # In threads that may stay behind: a board whose process is stopped never answers, and
        # torch's own timeout covers only a part of the question.
        asked, self._stores = self._stores, []
        for store in asked:
            threading.Thread(target=ask, args=(store,), daemon=True).start()
        newest: dict[int, Note] = {}
        wait = _ANSWER_SECONDS
        with contextlib.suppress(queue.Empty):
            for _ in asked:
                store, notes = answers.get(timeout=wait)
                # The others are held by their threads, for ever perhaps.
                self._stores.append(store)
                for rank, read in notes.items():
                    if rank not in newest or newest[rank].number < read.number:
                        newest[rank] = read
                wait = _SECOND_ANSWER_SECONDS
        return newest


def _hosted(timeout: timedelta) -> TCPStore | None:
    try:
        # Port 0: any that is free.
        return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, distributed.DistError) as error:
        _log.warning(
            "no board can be put up on this rank (%s): where ranks lose one another, less may be "
            "known of where they were",
            str(error).splitlines()[0],
        )
        return None


def _reached(host: str, port: int, timeout: timedelta) -> list[TCPStore]:
    try:
        return [TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)]
    except (RuntimeError, distributed.DistError) as error:
        _log.warning(
            "no connection to %s:%d (%s): where ranks lose one another, this one may not be able "
            "to say where the others were. Let the machines of a run reach each other's ports.",
            host, port, str(error).splitlines()[0],
        )  # fmt: skip
        return []


def _read(store: TCPStore, size: int) -> dict[int, Note]:
    # check first: get waits for a key that is not there.
    there = [rank for rank in range(size) if store.check([str(rank)])]
    if not there:
        return {}
    texts = store.multi_get([str(rank) for rank in there])
    return {rank: Note(**json.loads(text)) for rank, text in zip(there, texts, strict=True)}
