"""The newest status of every rank, for the others to read when they have lost it."""

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
"""How long to wait for the first store; one that is alive answers in a millisecond."""

_SECOND_ANSWER_SECONDS = 1.0
"""How long to wait for the other one, which knows the same, but for ranks that reached only one."""


@frozen(kw_only=True)
class RankStatus:
    """Where a rank is, as it publishes it.

    Attributes:
        number: counts the statuses of this rank; the newest has the largest.
        iteration, phase: what the rank does.
        checks: how many checks (``RankMonitor.check_in_sync``) the rank has begun.
        time: Unix seconds of the status.
        error: why the rank ends; None: it goes on.
        lost_others: the error is only that it lost another rank.
    """

    number: int
    iteration: int
    phase: str
    checks: int
    time: float = attrs.field(factory=time.time)
    error: str | None = None
    lost_others: bool = False

    @property
    def place(self) -> str:
        return f"iteration {self.iteration}, {self.phase}"


class StatusStore:
    """Two key-value stores with the newest status of every rank, on the first and the last rank.

    Two, so that a rank that dies never takes all of them with it; in most clusters the two are on
    different machines. Publishing a status is one message that nobody answers, so that it
    costs microseconds and waits for nobody, dead or stopped. Only ``exchange`` waits, and not for
    long. A store that fails is left out from then on: it must never hide what is wrong.
    """

    def __init__(self, rank: int, size: int, stores: Sequence[TCPStore]) -> None:
        self._rank = rank
        self._size = size
        self._stores = list(stores)
        self._open = True

    @classmethod
    def connect(cls, ranks: Ranks) -> StatusStore:
        """Start both stores and connect every rank to them. All ranks call it together.

        Raises:
            RankError: one of them does not come.
        """
        timeout = timedelta(seconds=min(_ANSWER_SECONDS, ranks.timeout))
        own = _host_store(timeout) if ranks.rank in (0, ranks.size - 1) else None
        addresses = ranks.gather_results(lambda: (socket.gethostname(), own and own.port))
        # Host names need not be known to a resolver where all are on one machine.
        one_machine = len({name for name, _ in addresses}) == 1
        stores = []
        for rank, (name, port) in enumerate(addresses):
            if rank == ranks.rank and own is not None:
                stores.append(own)
            elif port is not None:
                stores += _connect_store("127.0.0.1" if one_machine else name, port, timeout)
        return cls(ranks.rank, ranks.size, stores)

    def publish(self, status: RankStatus) -> None:
        """Replace this rank's status, without waiting for anybody."""
        if self._open:
            text = json.dumps(attrs.asdict(status))
            for store in tuple(self._stores):
                try:
                    store.set(str(self._rank), text)
                except RuntimeError:
                    self._stores.remove(store)

    def close(self) -> None:
        """Publish no more: from now on ranks end, and the stores that they host with them."""
        self._open = False

    def exchange(self, status: RankStatus) -> Mapping[int, RankStatus]:
        """Publish ``status`` and wait until it is stored; return the newest of every rank, as far
        as a store answers."""
        answers: queue.SimpleQueue[tuple[TCPStore, Mapping[int, RankStatus]]] = queue.SimpleQueue()

        def ask(store: TCPStore) -> None:
            try:
                # In one connection's order: whoever gets an answer has published, too.
                store.set(str(self._rank), json.dumps(attrs.asdict(status)))
                answers.put((store, _read_statuses(store, self._size)))
            except RuntimeError as error:
                _log.debug("a status store does not answer: %s", error)

        # In threads that may stay behind: a store whose process is stopped (SIGSTOP) never answers,
        # and torch's own timeout covers only a part of the question.
        asked, self._stores = self._stores, []
        for store in asked:
            threading.Thread(target=ask, args=(store,), daemon=True).start()
        newest: dict[int, RankStatus] = {}
        wait = _ANSWER_SECONDS
        with contextlib.suppress(queue.Empty):
            for _ in asked:
                store, statuses = answers.get(timeout=wait)
                # The stores that did not answer belong to their threads, for ever perhaps.
                self._stores.append(store)
                for rank, theirs in statuses.items():
                    if rank not in newest or newest[rank].number < theirs.number:
                        newest[rank] = theirs
                wait = _SECOND_ANSWER_SECONDS
        return newest


def _host_store(timeout: timedelta) -> TCPStore | None:
    try:
        # Port 0: any that is free.
        return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, distributed.DistError) as error:
        _log.warning(
            "no status store can be started on this rank (%s): where ranks lose one another, less "
            "may be known of where they were",
            str(error).splitlines()[0],
        )
        return None


def _connect_store(host: str, port: int, timeout: timedelta) -> list[TCPStore]:
    try:
        return [TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)]
    except (RuntimeError, distributed.DistError) as error:
        _log.warning(
            "no connection to %s:%d (%s): where ranks lose one another, this one may not be able "
            "to report where the others were. Let the machines of a run reach each other's ports.",
            host, port, str(error).splitlines()[0],
        )  # fmt: skip
        return []


def _read_statuses(store: TCPStore, size: int) -> dict[int, RankStatus]:
    # check first: get waits for a key that is not there.
    published = [rank for rank in range(size) if store.check([str(rank)])]
    if not published:
        return {}
    texts = store.multi_get([str(rank) for rank in published])
    return {
        rank: RankStatus(**json.loads(text)) for rank, text in zip(published, texts, strict=True)
    }
