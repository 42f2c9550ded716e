"""LTX-2 with sound: its parts, its guidance of four calls, and the stock pipeline's clips."""

from __future__ import annotations

from pathlib import Path

import ltx2_pipelines
import pytest
import torch
from attrs import evolve
from diffusers import LTX2Pipeline
from distill_adapters_ltx2 import PLUGIN, PUBLISHED, Ltx2Adapter, LTX2PipelineConfig
from distill_adapters_ltx2.kind import AUDIO, VIDEO
from distill_diffusers.architecture import build_on_meta
from distill_protocols import (
    ContractError,
    ExportRequest,
    LatentParts,
    RoleSpec,
    RowGenerators,
    SamplerSpec,
    draw_noise,
)
from family_cases import copy_out_of_mapped_files
from family_fixtures import ltx2_folder

__all__ = ["ltx2_folder"]

PROMPT, NEGATIVE = "a seven moving left", "moving"
CONFIG = LTX2PipelineConfig(
    num_frames=17, height=64, width=96, max_sequence_length=8, audio=True, audio_guidance=5.0,
    modality_scale=3.0, guidance_rescale=0.7,
)  # fmt: skip
SKIPPING = {"stg_scale": 1.0, "stg_blocks": (1,)}


def load(folder: Path, config: LTX2PipelineConfig) -> Ltx2Adapter:
    role = RoleSpec(name="student", path=str(folder), trainable=False)
    bundle = PLUGIN.load([role], config, device=torch.device("cpu"))
    adapter = PLUGIN.adapter(bundle, config, source=str(folder))
    assert isinstance(adapter, Ltx2Adapter)
    return adapter


@pytest.mark.parametrize("version", ltx2_pipelines.VERSIONS)
def test_clips_with_sound_are_those_of_the_stock_pipeline(ltx2_folder, version):
    """All four guided calls; the pipeline encodes both prompts in one call, so they round alike
    but for 1e-6."""
    folder = ltx2_folder(version)
    config = evolve(CONFIG, **(SKIPPING if version == "2.3" else {}))
    adapter = load(folder, config)
    pipeline = LTX2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    copy_out_of_mapped_files(pipeline)
    spec = SamplerSpec(steps=3, guidance=3.0, shift=2.0)
    request = ExportRequest(sampler=spec, format="diffusers")
    role = RoleSpec(name="student", path=str(folder), trainable=False)
    call = dict(PLUGIN.exporter(config, source=str(folder)).call_arguments(role, request))
    video, sound = pipeline(
        prompt=PROMPT, negative_prompt=NEGATIVE, output_type="latent", return_dict=False,
        generator=torch.Generator().manual_seed(3), **call,
    )  # fmt: skip
    levels = tuple((1000 * pipeline.scheduler.sigmas[:-1].double()).tolist())
    clips = adapter.sample(
        "student",
        evolve(spec, shift=1.0, timesteps=levels),
        draw_noise(adapter, adapter.latent_shape, RowGenerators.of_clips(3, [0])),
        adapter.encode_condition([PROMPT]),
        neg_cond=adapter.encode_neg_condition(NEGATIVE),
    )
    assert isinstance(clips, LatentParts)
    stock = {VIDEO: video, AUDIO: sound.unsqueeze(3)}
    ours = adapter.normalize_latents(LatentParts(stock))
    for part, tensor in clips.tensors.items():
        torch.testing.assert_close(ours.tensors[part], tensor, rtol=0, atol=1e-5)
        assert tensor.std() > 0.1


def test_a_guided_call_moves_by_each_of_its_parts(ltx2_folder):
    """Each scale changes the clip, and off all of them is u + w (c - u)."""
    folder = ltx2_folder("2.3")
    plain = evolve(CONFIG, modality_scale=1.0, guidance_rescale=0.0, audio_guidance=None)
    adapter = load(folder, plain)
    noise = draw_noise(adapter, adapter.latent_shape, RowGenerators.of_clips(0, [0, 1]))
    cond = adapter.encode_condition([PROMPT, "a"])
    negative = adapter.encode_neg_condition(NEGATIVE)
    t = torch.tensor([300.0, 800.0])

    def guided(w: float, **keys) -> LatentParts:
        return load(folder, evolve(plain, **keys)).forward(
            "student", noise, t, cond, neg_cond=negative, cfg=w
        )

    c, u, both = guided(1), guided(0), guided(3)
    for part in (VIDEO, AUDIO):
        expected = u.tensors[part] + 3 * (c.tensors[part] - u.tensors[part])
        torch.testing.assert_close(both.tensors[part], expected, rtol=1e-4, atol=1e-5)
    for keys in (SKIPPING, {"modality_scale": 2.0}, {"guidance_rescale": 0.5}):
        moved = guided(3, **keys)
        for part in (VIDEO, AUDIO):
            assert not torch.allclose(moved.tensors[part], both.tensors[part], atol=1e-4)
        assert torch.equal(guided(1, **keys).tensors[VIDEO], c.tensors[VIDEO])
    louder = guided(3, audio_guidance=7.0)
    assert torch.equal(louder.tensors[VIDEO], both.tensors[VIDEO])
    assert not torch.allclose(louder.tensors[AUDIO], both.tensors[AUDIO], atol=1e-4)
    with pytest.raises(ContractError, match="several named tensors"):
        adapter.forward("student", noise.tensors[VIDEO], t, cond)


def test_pictures_without_sound_do_not_depend_on_its_half(ltx2_folder):
    config = LTX2PipelineConfig(num_frames=9, height=64, width=64, max_sequence_length=4)
    adapter = load(ltx2_folder("2.3"), config)
    x, cond = torch.randn(1, *adapter.latent_shape), adapter.encode_condition([PROMPT])
    before = adapter.forward("student", x, torch.tensor([500.0]), cond)
    transformer = adapter.models["student"].modules["transformer"]
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "audio" in name or "av_cross_attn" in name or "a2v" in name:
                parameter.add_(1.0)
    assert torch.equal(adapter.forward("student", x, torch.tensor([500.0]), cond), before)


def test_the_sound_is_as_long_as_the_pictures(ltx2_folder):
    """121 frames of 24 a second are 5.04 s, of 25 latent frames a second."""
    config = evolve(CONFIG, num_frames=121)
    adapter = load(ltx2_folder("2.3"), config)
    assert adapter.part_shapes(adapter.latent_shape) == {
        VIDEO: (8, 16, 2, 3), AUDIO: (8, 126, 1, 2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("hub_id", "parameters"),
    [("Lightricks/LTX-2", 18_876_174_592), ("diffusers/LTX-2.3-Diffusers", 18_988_838_144)],
)
def test_published_sizes(hub_id, parameters):
    """Of the transformer alone; the hub calls LTX-2 19B."""
    module = build_on_meta(PLUGIN.kind, PUBLISHED[hub_id].transformers["transformer"])
    assert sum(tensor.numel() for tensor in module.parameters()) == parameters


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modality_scale": 3.0}, "no effect without sound"),
        ({"audio_guidance": 3.0}, "no effect without sound"),
        ({"stg_scale": 1.0, "stg_blocks": ()}, "numbers of blocks"),
    ],
)
def test_config_refuses(keys, message):
    with pytest.raises(ValueError, match=message):
        LTX2PipelineConfig(num_frames=9, height=64, width=64, **keys)


def test_skip_block_guidance_needs_a_model_that_skips(ltx2_folder):
    config = evolve(CONFIG, **SKIPPING)
    problems = [
        [problem.message for problem in PLUGIN.role_problems(role, config)]
        for role in (
            RoleSpec(name="student", path=str(ltx2_folder(version)), trainable=False)
            for version in ("2.0", "2.3")
        )
    ]
    assert "perturbed_attn" in problems[0][0]
    assert problems[1] == []
