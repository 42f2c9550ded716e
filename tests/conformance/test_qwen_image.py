"""Qwen-Image passes the suite of families.

Slow: the suite of LTX holds what both share in every run, and tests/adapters_qwen_image what is its
own.
"""

from __future__ import annotations

import pytest
from distill_adapters_qwen_image import PLUGIN, QwenImageConfig
from distill_conformance import AdapterCase, AdapterSuite
from family_fixtures import qwen_image_folder

__all__ = ["qwen_image_folder"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def case(qwen_image_folder) -> AdapterCase:
    return AdapterCase(
        plugin=PLUGIN,
        config=QwenImageConfig(height=32, width=48, max_sequence_length=10),
        source=qwen_image_folder,
        prompts=("a seven moving", "moving left a a"),
        negative_prompt="left",
        linear_guidance=False,
        # What the last block makes of the text is not read.
        unread_parameters=[
            f"transformer_blocks.1.{layer}.{end}"
            for layer in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
            for end in ("weight", "bias")
        ],
    )


class TestQwenImage(AdapterSuite):
    pass
