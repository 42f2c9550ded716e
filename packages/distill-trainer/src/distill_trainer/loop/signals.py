"""SIGTERM and SIGINT as requests to stop at the next safe point."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from distill_protocols import RunState

REPEATED_SIGINT_SECONDS = 3.0
"""Within these another SIGINT counts as the same Ctrl-C, where a launcher may forward it."""
_SET_BY_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "UV_RUN_RECURSION_DEPTH")
"""Variables that torchrun and ``uv run`` set for what they start."""


@contextlib.contextmanager
def stop_on_signals(run: RunState) -> Iterator[None]:
    """Let the first SIGTERM or SIGINT ask ``run`` to stop, and a SIGINT after it interrupt.

    Under a launcher (torchrun, ``uv run`` without a terminal, or anything else that started several
    ranks) one Ctrl-C may come twice or more: from the terminal, whose signal goes to its whole
    process group, and from each launcher in between, which forwards its own. So there a SIGINT
    within ``REPEATED_SIGINT_SECONDS`` of the last one that counted is the same request; it must
    come later to interrupt.

    Handlers can only be set in the main thread; elsewhere this does nothing. The former handlers
    are put back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    forwarded = run.ranks.size > 1 or any(name in os.environ for name in _SET_BY_LAUNCHERS)
    same_seconds = REPEATED_SIGINT_SECONDS if forwarded else 0.0
    counted: float | None = None

    def handle_signal(number: int, frame: FrameType | None) -> None:
        nonlocal counted
        now, last = time.monotonic(), counted
        if last is not None:
            if number == signal.SIGTERM or now - last < same_seconds:
                return
            counted = now
            raise KeyboardInterrupt
        counted = now
        name = signal.Signals(number).name
        run.request_stop(f"received {name}")
        again = (
            f"Ctrl-C again after {same_seconds:g} s: at once"
            if same_seconds
            else "Ctrl-C again: at once"
        )
        # os.write, as print and logging may be what the signal has just interrupted. A tee that
        # read this has got the same Ctrl-C, and may be gone.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: stopping at the next safe point ({again})\n".encode())

    former = {
        number: signal.signal(number, handle_signal) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            # None: it was set outside Python, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
