"""LTX-2 without sound passes the suite of families; with it, methods are tested on toy models."""

from __future__ import annotations

import pytest
from distill_adapters_ltx2 import PLUGIN, LTX2PipelineConfig
from distill_conformance import AdapterCase, AdapterSuite
from distill_diffusers.architecture import build_on_meta
from family_fixtures import ltx2_folder

__all__ = ["ltx2_folder"]


def unread(source: str) -> list[str]:
    """List the weights of the sound's half, which pictures do not see."""
    module = build_on_meta(PLUGIN.kind, PLUGIN.describe(source).main)
    marks = ("audio", "av_cross_attn", "a2v")
    return [name for name, _ in module.named_parameters() if any(m in name for m in marks)]


@pytest.fixture(scope="module")
def case(ltx2_folder) -> AdapterCase:
    config = LTX2PipelineConfig(num_frames=9, height=64, width=64, max_sequence_length=4)
    return AdapterCase(
        plugin=PLUGIN,
        config=config,
        source=ltx2_folder("2.3"),
        prompts=("a seven moving", "moving left a a"),
        negative_prompt="left",
        unread_parameters=unread(str(ltx2_folder("2.3"))),
    )


class TestLtx2(AdapterSuite):
    pass
