"""LongCat-Video passes the suite of families.

Slow: the suite of LTX holds what both share in every run, and tests/adapters_longcat what is its
own.
"""

from __future__ import annotations

import pytest
from distill_adapters_longcat import PLUGIN, LongCatPipelineConfig
from distill_conformance import AdapterCase, AdapterSuite
from family_fixtures import longcat_folder

__all__ = ["longcat_folder"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def case(longcat_folder) -> AdapterCase:
    config = LongCatPipelineConfig(num_frames=9, height=32, width=48, max_sequence_length=6)
    return AdapterCase(
        plugin=PLUGIN,
        config=config,
        source=longcat_folder,
        prompts=("a seven moving", "moving left a a"),
        negative_prompt="left",
        linear_guidance=False,
    )


class TestLongCat(AdapterSuite):
    pass
