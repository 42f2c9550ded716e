"""SIGTERM and SIGINT as a wish to stop at the next safe point."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from distill_protocols import RunState


@contextlib.contextmanager
def stop_on_signals(run: RunState) -> Iterator[None]:
    """Within: the first SIGTERM or SIGINT asks ``run`` to stop; a SIGINT after it interrupts.

    Handlers can only be set in the main thread; elsewhere this does nothing. Former handlers are
    put back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        name = signal.Signals(number).name
        run.request_stop(f"received {name}")
        # os.write, as print and logging may be what the signal has just interrupted.
        os.write(2, f"\n{name}: stopping at the next safe point (Ctrl-C again: at once)\n".encode())

    former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            # None: it was set outside Python, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
