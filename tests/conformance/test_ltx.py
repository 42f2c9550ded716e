"""LTX-Video passes the suite of families."""

from __future__ import annotations

import pytest
from distill_adapters_ltx import PLUGIN, LTXPipelineConfig
from distill_conformance import AdapterCase, AdapterSuite
from family_fixtures import ltx_folder

__all__ = ["ltx_folder"]


@pytest.fixture(scope="module")
def case(ltx_folder) -> AdapterCase:
    """0.9.1: its decoder draws noise, so that it shows who draws for whom."""
    config = LTXPipelineConfig(num_frames=17, height=32, width=64, max_sequence_length=6)
    return AdapterCase(
        plugin=PLUGIN,
        config=config,
        source=ltx_folder("0.9.1"),
        prompts=("a seven moving", "moving left a a"),
        negative_prompt="left",
    )


class TestLtx(AdapterSuite):
    pass
