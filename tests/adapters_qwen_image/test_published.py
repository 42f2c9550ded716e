"""Qwen-Image's real sizes on the meta device. No weight is read."""

from __future__ import annotations

import pytest
from distill_adapters_qwen_image import PLUGIN, PUBLISHED, QwenImageConfig
from distill_protocols import RoleSpec


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_parameter_counts(hub_id):
    config = QwenImageConfig(height=1328, width=1328)
    plan = PLUGIN.plan(RoleSpec(name="student", path=hub_id, trainable=True), config)
    counted = plan.parameters
    assert counted == count_parameters(width=3072, layers=60, taken=64, text=3584)
    assert counted == 20_430_401_088  # what the hub calls 20B
    assert PLUGIN.latent_shape(config, source=hub_id) == (16, 1, 166, 166)
    assert PLUGIN.latent_tokens(config, source=hub_id) == 6889


def count_parameters(width, layers, taken, text):
    """Count weights and biases: two streams, each with modulation, attention and MLP."""
    linear = lambda i, o: i * o + o  # noqa: E731
    attention = 4 * linear(width, width) + 2 * 128  # q, k, v, out; two norms of a head's width
    mlp = linear(width, 4 * width) + linear(4 * width, width)
    block = 2 * (linear(width, 6 * width) + attention + mlp)
    time = linear(256, width) + linear(width, width)
    ends = linear(taken, width) + text + linear(text, width)
    return layers * block + time + ends + linear(width, 2 * width) + linear(width, taken)
