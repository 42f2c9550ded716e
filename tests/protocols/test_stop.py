"""The stop flag by itself."""

from __future__ import annotations

import pytest
from distill_protocols import DistillError, StopFlag, StopRequested


def test_the_first_reason_is_kept_and_polled():
    flag = StopFlag()
    flag.poll()
    assert (flag.requested(), flag.reason) == (False, None)
    flag.request("preempted")
    flag.request("a later reason")
    assert (flag.requested(), flag.reason) == (True, "preempted")
    with pytest.raises(StopRequested, match=r"^preempted$"):
        flag.poll()
    with pytest.raises(StopRequested):  # whoever swallowed the first hears of it again
        flag.poll()


def test_a_stop_is_no_error():
    """``except Exception`` around a model call must not swallow it."""
    assert not issubclass(StopRequested, Exception)
    assert not issubclass(StopRequested, DistillError)


def test_several_ranks_have_a_reason_only_once_they_have_agreed():
    asked: list[str | None] = []
    answers = [None, None, "received SIGTERM (rank 3)"]

    def agree(own: str | None) -> str | None:
        asked.append(own)
        return answers[len(asked) - 1]

    flag = StopFlag(agree)
    flag.poll()
    flag.request("Ctrl-C")
    assert flag.reason is None, "the other ranks know nothing of it yet"
    assert not flag.requested()
    with pytest.raises(StopRequested, match="rank 3"):
        flag.poll()
    assert asked == [None, "Ctrl-C", "Ctrl-C"]
    assert flag.reason == "received SIGTERM (rank 3)"
    assert flag.requested()
    assert len(asked) == 3, "what is agreed is not asked again: no rank waits for the others"
