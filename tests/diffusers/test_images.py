"""What image families share: their section, their conditions, their encoders by number."""

from __future__ import annotations

import json

import pytest
import torch
from attrs import field, frozen
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.components.encoders import numbered_parts
from distill_diffusers.config import ImageConfig
from distill_protocols import Condition, ConditioningError, WeightsError

CPU = torch.device("cpu")


@frozen(kw_only=True)
class LargePatchConfig(ImageConfig):
    """A family with a unit and a key of its own."""

    pixel_unit = 32
    length: int = field(default=8)


def test_pixels_are_a_whole_number_of_tokens():
    config = LargePatchConfig(height=64, width=96)
    assert (config.num_frames, config.cfg_batched, config.components) == (1, True, None)
    with pytest.raises(ValueError, match=r"48 must be divisible by 32.*32 or 64"):
        LargePatchConfig(height=48, width=64)
    with pytest.raises(ValueError, match=r"0 must be divisible by 16.*16 or 32"):
        ImageConfig(height=16, width=0)


def test_a_condition_is_read_by_the_shapes_of_its_rows():
    cond = Condition({"text": torch.zeros(2, 5, 6), "pooled": torch.ones(2, 7)})
    shapes = {"text": (5, 6), "pooled": (7,)}
    tensors = read_condition(cond, shapes, CPU)
    assert tensors.keys() == shapes.keys()
    assert torch.equal(tensors["pooled"], torch.ones(2, 7))
    assert list(read_condition(cond, {"pooled": (7,)}, CPU)) == ["pooled"]
    with pytest.raises(ConditioningError, match=r"'text' .* \[5, 6\] a row.*takes \[4, 6\]"):
        read_condition(cond, {**shapes, "text": (4, 6)}, CPU)
    with pytest.raises(ConditioningError, match=r"'mask' of the condition is absent"):
        read_condition(cond, {**shapes, "mask": (5,)}, CPU)


def test_encoders_are_those_of_the_index(tmp_path):
    index = {
        "text_encoder": ["transformers", "A"],
        "text_encoder_2": [None, None],
        "text_encoder_3": ["transformers", "C"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    parts = numbered_parts(str(tmp_path), ["m:A", "m:B", "m:C", "m:D"])
    assert [(p.model, p.encoder, p.tokenizer) for p in parts] == [
        ("m:A", "text_encoder", "tokenizer"),
        ("m:C", "text_encoder_3", "tokenizer_3"),
    ]
    with pytest.raises(WeightsError, match="is no folder"):
        numbered_parts(str(tmp_path / "none"), ["m:A"])
