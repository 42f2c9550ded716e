"""What diffusers says is hidden for a while, and heard again."""

from __future__ import annotations

import contextlib

import pytest
from diffusers.utils import logging
from distill_diffusers.export.verification import without_messages


@pytest.fixture
def _as_before():
    level, enabled = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(level)
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("enabled", [True, False])
def test_an_error_too_gives_the_messages_back(enabled):
    logging.set_verbosity_info()
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    with contextlib.suppress(KeyError), without_messages():
        assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.ERROR
        raise KeyError
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled() == enabled
