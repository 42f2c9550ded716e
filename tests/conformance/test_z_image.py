"""Z-Image passes the suite of families.

Slow: the suite of LTX holds what both share in every run, and tests/adapters_z_image what is its
own.
"""

from __future__ import annotations

import pytest
from distill_adapters_z_image import PLUGIN, ZImageConfig
from distill_conformance import AdapterCase, AdapterSuite
from family_fixtures import z_image_folder

__all__ = ["z_image_folder"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def case(z_image_folder) -> AdapterCase:
    return AdapterCase(
        plugin=PLUGIN,
        config=ZImageConfig(height=48, width=64, max_sequence_length=16),
        source=z_image_folder,
        prompts=("a seven moving", "moving left a a"),
        negative_prompt="left",
    )


class TestZImage(AdapterSuite):
    pass
