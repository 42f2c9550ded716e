"""LTX's real sizes on the meta device. No weight is read."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from distill_adapters_ltx import PUBLISHED
from distill_adapters_ltx.published import LATENT_CHANNELS

EVERY = pytest.mark.parametrize("hub_id", PUBLISHED)
# What the hub calls 1.92B and 13B.
PARAMETERS = {28: 1_923_385_472, 48: 13_042_569_344}


def architecture(hub_id):
    return PUBLISHED[hub_id].transformers["transformer"]


@functools.cache
def shapes(hub_id):
    with torch.device("meta"):
        transformer = LTXVideoTransformer3DModel(**architecture(hub_id))
    return {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}


def count_parameters(width, layers, taken, text):
    """Count weights and biases of an LTX transformer: FFN of four widths, 256 frequencies."""
    linear = lambda i, o: i * o + o  # noqa: E731
    attention = 4 * linear(width, width) + 2 * width  # q, k, v, out; two norms over all heads
    block = 2 * attention + linear(width, 4 * width) + linear(4 * width, width) + 6 * width
    time = linear(256, width) + linear(width, width) + linear(width, 6 * width)
    captions = linear(text, width) + linear(width, width)
    ends = linear(taken, width) + linear(width, taken) + 2 * width
    return layers * block + time + captions + ends


@EVERY
def test_parameter_counts(hub_id):
    config = architecture(hub_id)
    counted = sum(torch.Size(shape).numel() for shape in shapes(hub_id).values())
    assert counted == PARAMETERS[config["num_layers"]]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    assert width == config["cross_attention_dim"]  # captions are projected to the width first
    assert counted == count_parameters(width, config["num_layers"], LATENT_CHANNELS, 4096)


def test_the_2b_model_is_diffusers_default():
    assert shapes("Lightricks/LTX-Video") == {
        name: tuple(tensor.shape) for name, tensor in default().items()
    }


def default():
    with torch.device("meta"):
        return LTXVideoTransformer3DModel().state_dict()
