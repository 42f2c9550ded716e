"""HunyuanVideo passes the suite of families.

Slow: 20 seconds, and the suite of LTX holds what both share in every run.
"""

from __future__ import annotations

import pytest
from distill_adapters_hunyuan import HUNYUAN_VIDEO_PLUGIN, HunyuanVideoConfig
from distill_conformance import AdapterCase, AdapterSuite
from family_fixtures import hunyuan_folder

__all__ = ["hunyuan_folder"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def case(hunyuan_folder) -> AdapterCase:
    config = HunyuanVideoConfig(num_frames=9, height=32, width=48, max_sequence_length=6)
    return AdapterCase(
        plugin=HUNYUAN_VIDEO_PLUGIN,
        config=config,
        source=hunyuan_folder("video"),
        prompts=("a seven moving", "moving left a a"),
        negative_prompt="left",
        linear_guidance=False,  # w is an input
    )


class TestHunyuanVideo(AdapterSuite):
    # Guidance is one call, and reads no negative condition.
    test_guidance_needs_a_negative = None
