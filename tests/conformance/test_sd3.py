"""The example family Stable Diffusion 3, as it is installed, passes the suite of families."""

from __future__ import annotations

import pytest
from distill_conformance import AdapterCase, AdapterSuite
from family_fixtures import installed, sd3, sd3_folder

__all__ = ["installed", "sd3", "sd3_folder"]


@pytest.fixture(scope="module")
def case(sd3, sd3_folder) -> AdapterCase:
    return AdapterCase(
        plugin=sd3.plugin.PLUGIN,
        config=sd3.config.SD3PipelineConfig(height=32, width=48, max_sequence_length=6),
        source=sd3_folder("3.5-medium"),
        prompts=("a seven moving", "moving left a a"),
        negative_prompt="left",
        # The text that would come out of the last block is thrown away.
        unread_parameters=(
            "blocks.1.attn.add_q_proj.weight",
            "blocks.1.attn.add_q_proj.bias",
            "blocks.1.attn.norm_added_q.weight",
        ),
    )


class TestSd3(AdapterSuite):
    pass
