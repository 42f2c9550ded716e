"""The wish to stop a run, and how whatever takes long hears of it. Without torch."""

from __future__ import annotations

from collections.abc import Callable


class StopRequested(BaseException):
    """Raised by ``StopFlag.poll``: leave what you are doing, the run shall stop.

    Nothing failed, so it is no ``DistillError``; and like ``KeyboardInterrupt`` it is no
    ``Exception``, so that no ``except Exception`` around a model call swallows it. ``finally``
    and ``with`` blocks clean up as for any other. The trainer catches it: no run ends with it.
    """


class StopFlag:
    """One a run (``DistillMethod.stop``): why to stop, or that there is no reason to.

    On several ranks one that is asked must not stop alone: the others would wait for it for ever.
    So there ``requested`` and ``poll`` are collective questions. **All ranks must ask equally
    often**, at the same points of the same program; what a single rank does by itself (writing a
    file, say) must not ask. On one process they cost an attribute.

    Args:
        agree: gives every rank the same answer: this rank's own reason, or None, goes in, and a
            reason comes out on all ranks as soon as any has one. None: there is one process.
    """

    def __init__(self, agree: Callable[[str | None], str | None] | None = None) -> None:
        self._agree = agree
        self._own: str | None = None
        self._agreed: str | None = None

    @property
    def reason(self) -> str | None:
        """Why to stop; None: go on. The same on all ranks: what one of them was asked since the
        last question is not in it yet."""
        return self._own if self._agree is None else self._agreed

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason is kept. A signal handler or a thread may call it."""
        if self._own is None:
            self._own = reason

    def requested(self) -> bool:
        """Return whether to stop, asked of all ranks together; then all of them have the reason."""
        if self._agree is not None and self._agreed is None:
            self._agreed = self._agree(self._own)
        return self.reason is not None

    def poll(self) -> None:
        """Call it between the parts of whatever takes long (``requested``, and leave if so).

        Raises:
            StopRequested: the run shall stop.
        """
        if self.requested():
            raise StopRequested(self.reason)
