"""A variance-preserving family with a U-Net passes the suite of families."""

from __future__ import annotations

import pytest
import unet_family
from distill_conformance import AdapterCase, AdapterSuite
from distill_diffusers.config import ImageConfig

# What is its own is tested in tests/diffusers/test_variance_preserving.py in half the time.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> AdapterCase:
    return AdapterCase(
        plugin=unet_family.PLUGIN,
        config=ImageConfig(height=32, width=48),
        source=unet_family.build(tmp_path_factory.mktemp("unet") / "pipeline"),
        prompts=("a seven moving", "moving left a a"),
        negative_prompt="left",
    )


class TestUnet(AdapterSuite):
    """All checks but those that sample from t = 1000, which the model does not know."""

    test_global_random_state = test_guided_samples = test_rollout_exits = None
    test_rollout_is_sample = test_rollout_predicts_at_its_exit = test_rollout_trains_the_role = None
    test_sample_shape = test_sampler_follows_the_spec = test_samples_are_independent = None
    test_solvers = test_stop = None
