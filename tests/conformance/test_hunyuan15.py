"""HunyuanVideo 1.5 passes the suite of families, from text and from a picture.

Slow: a call has a thousand tokens, as the pipelines always give 729 of a picture.
"""

from __future__ import annotations

import pytest
from distill_adapters_hunyuan import HUNYUAN_VIDEO15_PLUGIN, HunyuanVideo15Config
from distill_conformance import AdapterCase, AdapterSuite
from family_fixtures import hunyuan_folder

__all__ = ["hunyuan_folder"]

UNREAD = tuple(
    f"{layer}.{kind}"
    for layer in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
    for kind in ("weight", "bias")
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def case(request, hunyuan_folder) -> AdapterCase:
    config = HunyuanVideo15Config(
        num_frames=5, height=32, width=32, max_sequence_length=6, glyph_sequence_length=8
    )
    return AdapterCase(
        plugin=HUNYUAN_VIDEO15_PLUGIN,
        config=config,
        source=hunyuan_folder(request.param),
        prompts=("a seven moving", 'moving left "a a"'),
        negative_prompt="left",
        # Of the last block, what makes text of text.
        unread_parameters=[f"transformer_blocks.1.{name}" for name in UNREAD],
    )


class TestHunyuanVideo15(AdapterSuite):
    pass
