"""Names and arithmetic of low-rank adapters."""

from __future__ import annotations

import pytest
import torch
from distill_diffusers.lora import adapter_names, base_name, merge, names_of
from distill_protocols import WeightsError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_into_sixteen_bits_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(s, generator=generator) for s in ((8, 6), (2, 6), (8, 2)))
    merged = merge(weight.to(dtype), a, b, 0.5)
    assert merged.dtype == torch.float32
    exact = weight.to(dtype).double() + 0.5 * b.double() @ a.double()
    assert torch.allclose(merged.double(), exact, atol=1e-6)


def test_names_of_adapters_and_of_their_base():
    pairs = adapter_names(["z.bias", *names_of("b"), *names_of("blocks.0.attn1.to_q")])
    assert pairs == {layer: names_of(layer) for layer in ("b", "blocks.0.attn1.to_q")}
    assert base_name("blocks.0.attn1.to_q.base_layer.weight") == "blocks.0.attn1.to_q.weight"
    assert base_name("proj_out.bias") == "proj_out.bias"
    with pytest.raises(WeightsError, match=r"b\.lora_B\.default\.weight missing"):
        adapter_names(names_of("b")[:1])
