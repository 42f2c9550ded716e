"""Stock pipelines of the tiny SD 3 folders, and the example family."""

from __future__ import annotations

import pytest
import sd3_pipelines
from family_fixtures import installed, sd3
from family_fixtures import sd3_folder as folders

__all__ = ["folders", "installed", "sd3", "stock"]

WITHOUT_T5 = ("text_encoder_3", "tokenizer_3")
"""Components that must be passed to from_pretrained as None, though the index has null."""


@pytest.fixture(scope="session")
def stock(folders):
    """Return the stock pipeline of a version, loaded on first use."""
    from diffusers import StableDiffusion3Pipeline

    loaded = {}

    def pipeline(version: str = "3-medium"):
        if version not in loaded:
            absent = {} if sd3_pipelines.VERSIONS[version].t5 else dict.fromkeys(WITHOUT_T5)
            loaded[version] = StableDiffusion3Pipeline.from_pretrained(folders(version), **absent)
            loaded[version].set_progress_bar_config(disable=True)
        return loaded[version]

    return pipeline
