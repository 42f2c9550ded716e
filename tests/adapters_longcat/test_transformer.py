"""The transformer is the original's: names, numbers and outputs.

``original.safetensors`` holds what meituan-longcat/LongCat-Video at commit 6b3f4b8 computed on the
CPU in fp32, its kernels replaced by torch's attention: by ``text_tokens_zero_pad``, one call of its
transformer, with one frame given, on two cached frames, and clips sampled in four steps.
"""

from __future__ import annotations

from pathlib import Path

import longcat_pipelines
import pytest
import torch
from distill_adapters_longcat import PUBLISHED, LongCatVideoTransformer3DModel
from distill_adapters_longcat.layers import make_rotation, rotate
from longcat_inputs import latents, normal, text
from safetensors.torch import load_file

RECORDED = load_file(Path(__file__).parent / "original.safetensors")
ATOL = 1e-5
"""In fp32; torch sums in another order on another machine."""
PARAMETERS = 13_581_071_424
TIMES = torch.tensor([833.33, 211.7])
EITHER = pytest.mark.parametrize("zero_pad", [True, False])


@pytest.fixture(scope="module")
def build():
    made = {}

    def build(zero_pad: bool) -> LongCatVideoTransformer3DModel:
        if zero_pad not in made:
            model = LongCatVideoTransformer3DModel(
                **longcat_pipelines.DIT, text_tokens_zero_pad=zero_pad
            )
            longcat_pipelines.draw_weights(model)
            made[zero_pad] = model.eval()
        return made[zero_pad]

    return build


def times(given: int) -> torch.Tensor:
    t = TIMES[:, None].repeat(1, 3)
    t[:, :given] = 0
    return t


@torch.no_grad()
def call(model, x, t, **options):
    embeds, mask = text()
    return model(x, t, embeds, mask, return_dict=False, **options)[0]


@EITHER
@torch.no_grad()
def test_outputs_are_the_originals(build, zero_pad):
    model, x = build(zero_pad), latents()
    torch.testing.assert_close(
        call(model, x, TIMES), RECORDED[f"{zero_pad}.forward"], rtol=0, atol=ATOL
    )
    one = call(model, x, times(1), given_frames=1)
    torch.testing.assert_close(one, RECORDED[f"{zero_pad}.given1"], rtol=0, atol=ATOL)
    _, past = model(x[:, :, :2], torch.zeros(2, 2), keep=True, return_dict=False)
    rest = call(model, x[:, :, 2:], times(2)[:, 2:], past=past)
    torch.testing.assert_close(rest, RECORDED[f"{zero_pad}.past2"], rtol=0, atol=ATOL)


@EITHER
def test_cached_given_frames_are_those_within_the_clip(build, zero_pad):
    """Given frames read neither the text nor the frames that are predicted."""
    model, x = build(zero_pad), latents()
    clip = call(model, x, times(2), given_frames=2)
    with torch.no_grad():
        given, past = model(x[:, :, :2], torch.zeros(2, 2), keep=True, return_dict=False)
    rest = call(model, x[:, :, 2:], times(2)[:, 2:], past=past)
    torch.testing.assert_close(torch.cat([given, rest], dim=2), clip, rtol=0, atol=ATOL)
    noise = torch.cat([x[:, :, :2], latents()[:, :, 2:] + 1], dim=2)
    other = call(model, noise, times(2), given_frames=2)
    torch.testing.assert_close(other[:, :, :2], given, rtol=0, atol=ATOL)
    assert (other[:, :, 2:] - rest).abs().max() > 1e-3


@EITHER
@torch.no_grad()
def test_padding_of_the_text_is_not_read_but_its_mask_is(build, zero_pad):
    model, x = build(zero_pad), latents()
    embeds, mask = text()
    cleared = torch.where(mask[..., None] > 0, embeds, 0.0)
    masked = model(x, TIMES, embeds, mask, return_dict=False)[0]
    again = model(x, TIMES, cleared, mask, return_dict=False)[0]
    torch.testing.assert_close(again, masked, rtol=0, atol=ATOL)
    full = model(x, TIMES, embeds, None, return_dict=False)[0]
    assert (full - masked).abs().max() > 1e-3


def test_rotations_depend_on_distances_alone():
    """q.k of two tokens is that of two others as far from each other (RoFormer, eq. 16)."""
    rotation = make_rotation((4, 3, 3), 24, torch.device("cpu"))
    q, k = (
        rotate(normal(1, 1, 1, 24, seed=s).expand(1, 1, 36, 24), rotation)[0, 0] for s in (1, 2)
    )
    scores = (q @ k.T).view(4, 3, 3, 4, 3, 3)
    moved = scores[1:, 1:, 1:, 1:, 1:, 1:]
    torch.testing.assert_close(moved, scores[:-1, :-1, :-1, :-1, :-1, :-1], rtol=0, atol=1e-4)
    later = make_rotation((2, 3, 3), 24, torch.device("cpu"), first_frame=2)
    assert torch.equal(later.cos, rotation.cos[18:])


def test_the_published_model_has_13_6_billion_parameters():
    """Counted by hand: attention to clip and text, a SwiGLU of 11,008, and modulation by 512."""
    (config,) = PUBLISHED["meituan-longcat/LongCat-Video"].transformers.values()
    with torch.device("meta"):
        model = LongCatVideoTransformer3DModel(**config)
    linear = lambda i, o: i * o + o  # noqa: E731
    width, head, inner, time = 4096, 128, 11_008, 512
    block = linear(width, 3 * width) + 2 * head + linear(width, width)  # self-attention
    block += linear(width, width) + linear(width, 2 * width) + 2 * head + linear(width, width)
    block += 3 * width * inner + 2 * width + linear(time, 6 * width)
    ends = linear(16 * 4, width) + linear(256, time) + linear(time, time)
    ends += 2 * linear(width, width) + linear(width, 64) + linear(time, 2 * width)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == 48 * block + ends == PARAMETERS


def test_a_config_is_written_as_it_was_read(tmp_path):
    """The original's own keys stay, which choose its kernels: without them it computes nothing."""
    model = LongCatVideoTransformer3DModel(**longcat_pipelines.DIT)
    model.save_config(tmp_path)
    again = LongCatVideoTransformer3DModel.from_config(
        LongCatVideoTransformer3DModel.load_config(tmp_path)
    )
    assert again.config["enable_flashattn2"]
    assert again.config["bsa_params"] == {"sparsity": 0.9375}
