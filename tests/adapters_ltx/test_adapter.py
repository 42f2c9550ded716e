"""The adapter's clips are the stock pipeline's, and its conditions are checked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline, LTXPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from distill_adapters_ltx import PLUGIN, LTXPipelineConfig
from distill_adapters_ltx.codec import DECODE_SEED
from distill_diffusers.calls.tokens import pack, unpack
from distill_diffusers.fingerprints import latent_statistics
from distill_protocols import (
    Condition,
    ConditioningError,
    DynamicShift,
    Precision,
    RoleSpec,
    SamplerSpec,
    WeightsError,
)
from PIL import Image
from torch import Tensor

CONFIG = LTXPipelineConfig(num_frames=17, height=64, width=96, frame_rate=24, max_sequence_length=8)
CLIP = {
    "num_frames": 17, "height": 64, "width": 96, "frame_rate": 24, "max_sequence_length": 8,
}  # fmt: skip
PROMPTS, NEGATIVE = ["a seven moving left", "a"], "moving"
PUBLISHED_SHIFT = DynamicShift(
    base_tokens=1024, base_mu=0.95, max_tokens=4096, max_mu=2.05, terminal=0.1
)
"""Of the schedulers of 0.9.0 and 0.9.1."""
CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@pytest.fixture(scope="module")
def load(folder_of):
    def load(version="0.9.0", config=CONFIG, precision: Precision = "fp32"):
        folder = str(folder_of(version))
        role = RoleSpec(name="teacher", path=folder, trainable=False, precision=precision)
        bundle = PLUGIN.load([role], config, device=CPU)
        return PLUGIN.adapter(bundle, config, source=folder)

    return load


def noise(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, 8, 3, 2, 3, generator=torch.Generator().manual_seed(seed))


def conditions(adapter, rows: int = 2) -> tuple[Condition, Condition]:
    return adapter.encode_condition(PROMPTS[:rows]), adapter.encode_neg_condition(NEGATIVE)


def sampler_of(version: str, steps: int, guidance: float = 1.0) -> SamplerSpec:
    if version == "0.9.5":
        return SamplerSpec(steps=steps, guidance=guidance)
    spec = SamplerSpec(steps=steps, shift=PUBLISHED_SHIFT, guidance=guidance)
    tokens = PLUGIN.latent_tokens(CONFIG, source="")
    return spec.resolved(18 if tokens is None else tokens)


def exact(spec: SamplerSpec, scheduler) -> SamplerSpec:
    """Take the scheduler's own numbers, which may be one fp32 step from those of a spec."""
    assert torch.allclose(scheduler.sigmas[:-1], torch.tensor(spec.sigmas()), rtol=0, atol=2.4e-7)
    times = tuple(1000 * float(sigma) for sigma in scheduler.sigmas[:-1].double())
    return evolve(spec, shift=1.0, timesteps=times)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.5"])
def test_sampled_latents_are_the_stock_pipelines(load, stock, version, rescale, guidance):
    adapter = load(version, evolve(CONFIG, guidance_rescale=rescale))
    pipeline, rows = stock(version), noise()
    theirs = pipeline(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=pack(rows), **CLIP,
        num_inference_steps=5, guidance_scale=guidance, guidance_rescale=rescale,
        output_type="latent",
    ).frames  # fmt: skip
    cond, negative = conditions(adapter)
    spec = exact(sampler_of(version, 5, guidance), pipeline.scheduler)
    ours = adapter.sample("teacher", spec, rows, cond, neg_cond=negative)
    assert torch.equal(ours, unpack(theirs, (3, 2, 3)))


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.5"])
def test_decoded_clips_are_the_stock_pipelines(load, stock, version):
    adapter, pipeline = load(version), stock(version)
    rows = noise(1)
    ending = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    with torch.random.fork_rng():
        torch.manual_seed(DECODE_SEED)
        theirs = pipeline(
            prompt=PROMPTS[:1], latents=pack(rows), **CLIP, **ending, num_inference_steps=2,
            guidance_scale=1.0, generator=torch.Generator().manual_seed(DECODE_SEED),
            output_type="pt",
        ).frames  # fmt: skip
    spec = exact(sampler_of(version, 2), pipeline.scheduler)
    latents = adapter.sample("teacher", spec, rows, conditions(adapter, 1)[0])
    state = torch.get_rng_state()
    clip = adapter.decode(latents)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(clip, theirs.permute(0, 2, 1, 3, 4))
    assert theirs.std() > 0.01
    both = adapter.decode(torch.cat([noise(1, seed=3), latents]))
    assert torch.allclose(both[1:], clip, atol=1e-5)  # noise of a decoder is a clip's own


def test_raw_latents_are_normalised_by_the_vaes_buffers(load, stock):
    adapter, vae = load(), stock().vae
    raw, mean, std = noise(), vae.latents_mean, vae.latents_std
    factor = vae.config.scaling_factor
    latents = adapter.normalize_latents(raw)
    assert torch.equal(latents, LTXPipeline._normalize_latents(raw, mean, std, factor))
    assert torch.equal(
        adapter.denormalize_latents(latents),
        LTXPipeline._denormalize_latents(latents, mean, std, factor),
    )
    assert factor == 0.5


def test_a_condition_is_zero_beyond_its_prompt(load):
    cond = load().encode_condition(PROMPTS)
    assert cond.tensors["text_mask"].sum(dim=1).tolist() == [5, 2]
    assert not cond.tensors["text"][1, 2:].any()
    assert cond.tensors["text"][1, :2].all()


def test_a_condition_of_another_length_is_refused(load):
    adapter, t = load(), torch.full((2,), 500.0)
    cond = adapter.encode_condition(PROMPTS)
    short = Condition({name: tensor[:, :4] for name, tensor in cond.tensors.items()})
    with pytest.raises(ConditioningError, match=r"\[4, 16\] a row, and the model takes \[8, 16\]"):
        adapter.forward("teacher", noise(), t, short)


@pytest.mark.parametrize("batched", [True, False])
@torch.no_grad()
def test_guidance_in_training_is_rescaled_too(load, batched):
    adapter = load(config=evolve(CONFIG, guidance_rescale=0.7, cfg_batched=batched))
    cond, negative = conditions(adapter)
    t = torch.tensor([900.0, 300.0])
    c = adapter.forward("teacher", noise(), t, cond)
    u = adapter.forward("teacher", noise(), t, negative)
    guided = u + 3 * (c - u)
    spread = c.std(dim=(1, 2, 3, 4), keepdim=True) / guided.std(dim=(1, 2, 3, 4), keepdim=True)
    prediction = adapter.forward("teacher", noise(), t, cond, neg_cond=negative, cfg=3.0)
    torch.testing.assert_close(prediction, 0.7 * guided * spread + 0.3 * guided)


@torch.no_grad()
def test_frame_rate_and_mask_reach_the_model(load):
    t = torch.tensor([900.0, 300.0])
    cond = load().encode_condition(PROMPTS)
    at_24 = load().forward("teacher", noise(), t, cond)
    at_30 = load(config=evolve(CONFIG, frame_rate=30)).forward("teacher", noise(), t, cond)
    assert (at_24 - at_30).abs().max() > 1e-3
    full = Condition({**cond.tensors, "text_mask": torch.ones(2, 8)})
    assert (at_24 - load().forward("teacher", noise(), t, full)).abs().max() > 1e-3


def test_a_bf16_role_computes_in_bf16(load):
    cond = load().encode_condition(PROMPTS)
    t = torch.tensor([900.0, 300.0])
    wide, narrow = (
        load(precision=precision).forward("teacher", noise(), t, cond) for precision in PRECISIONS
    )
    assert narrow.dtype == torch.float32
    assert 1e-4 < (wide - narrow).abs().max() < 0.1


def test_a_model_of_an_unknown_pipeline_is_refused(folder_of, tmp_path):
    folder = Path(shutil.copytree(folder_of("0.9.7"), tmp_path / "model"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("LTXConditionPipeline", "LTX2Pipeline"))
    role = RoleSpec(name="teacher", path=str(folder), trainable=False)
    (problem,) = PLUGIN.role_problems(role, CONFIG)
    assert "LTX2Pipeline" in problem.message
    with pytest.raises(WeightsError, match="LTX2Pipeline"):
        PLUGIN.load([role], CONFIG, device=CPU)


def test_models_of_two_kinds_of_pipelines_are_no_run(folder_of):
    roles = [
        RoleSpec(name=version, path=str(folder_of(version)), trainable=False)
        for version in ("0.9.5", "0.9.7")
    ]
    bundle = PLUGIN.load(roles, CONFIG, device=CPU)
    with pytest.raises(WeightsError, match="LTXConditionPipeline and LTXPipeline"):
        PLUGIN.adapter(bundle, CONFIG, source=roles[0].path)


# -- given frames ---------------------------------------------------------------------------------


def video(frames: int = 17, seed: int = 5) -> Tensor:
    """Smooth 8-bit pixels [1, 3, F, 64, 96] in [0, 1]."""
    small = torch.randn(1, 3, frames, 3, 4, generator=torch.Generator().manual_seed(seed))
    size = (frames, 64, 96)
    whole = torch.nn.functional.interpolate(small.sigmoid(), size=size, mode="trilinear")
    return (whole * 255).round() / 255


def pictures(clip: Tensor) -> list[Image.Image]:
    pixels = (clip[0] * 255).round().byte().permute(1, 2, 3, 0).numpy()
    return [Image.fromarray(frame) for frame in pixels]


@pytest.fixture
def _latents_of_pictures(monkeypatch):
    """The pipelines draw latents of given frames, where the trainer takes the posterior's mean, and
    leave out the VAE's scaling factor, which is 1 in all published models."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    normalize = LTXPipeline._normalize_latents
    for pipeline in (LTXImageToVideoPipeline, LTXConditionPipeline):
        monkeypatch.setattr(
            pipeline,
            "_normalize_latents",
            staticmethod(lambda latents, mean, std: normalize(latents, mean, std, 0.5)),
        )


@pytest.mark.usefixtures("_latents_of_pictures")
@pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])
def test_clips_from_a_first_frame_are_the_stock_pipelines(load, stock, version):
    adapter = load(version)
    pipeline = LTXImageToVideoPipeline(**stock(version).components)
    pipeline.set_progress_bar_config(disable=True)
    given = video(1)
    theirs = pipeline(
        image=pictures(given)[0], prompt=PROMPTS[0], negative_prompt=NEGATIVE, **CLIP,
        num_inference_steps=4, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    cond, negative = conditions(adapter, 1)
    cond = adapter.with_image(cond, given[:, :, 0])
    spec = exact(sampler_of(version, 4, 3.0), pipeline.scheduler)
    ours = adapter.sample("teacher", spec, noise(1), cond, neg_cond=negative)
    assert torch.equal(ours, unpack(theirs, (3, 2, 3)))
    assert torch.equal(ours[:, :, :1], cond.tensors["image_latents"])
    text = adapter.sample("teacher", spec, noise(1), conditions(adapter, 1)[0], neg_cond=negative)
    assert not torch.allclose(text[:, :, 1:], ours[:, :, 1:], atol=1e-3)


@pytest.mark.usefixtures("_latents_of_pictures")
@pytest.mark.parametrize("given", ["text", "first", "several", "last"])
def test_clips_are_those_of_the_condition_pipeline(load, stock, given):
    adapter, pipeline = load("0.9.7"), stock("0.9.7")
    clip = video()
    images = pictures(clip)
    frames: list[Any] = {
        "text": [],
        "first": [LTXVideoCondition(image=images[0])],
        "several": [LTXVideoCondition(video=images[:9])],
        "last": [
            LTXVideoCondition(image=images[0]), LTXVideoCondition(image=images[-1], frame_index=16),
        ],
    }[given]  # fmt: skip
    spec = SamplerSpec(steps=3, timesteps=(1000.0, 800.0, 450.0), guidance=3.0)
    theirs = pipeline(
        conditions=frames or None, prompt=PROMPTS[:1], negative_prompt=[NEGATIVE], **CLIP,
        timesteps=[1000.0, 800.0, 450.0], guidance_scale=3.0, output_type="latent",
        image_cond_noise_scale=0.0, generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    cond, negative = conditions(adapter, 1)
    if given == "last":
        cond = adapter.with_image(cond, clip[:, :, 0], last=clip[:, :, -1])
    elif given != "text":
        cond = adapter.with_image(cond, clip[:, :, : 9 if given == "several" else 1])
    ours = adapter.sample("teacher", spec, noise(1), cond, neg_cond=negative)
    assert torch.equal(ours, theirs)
    assert theirs.std() > 0.1
    mask = None if given == "text" else adapter.trained_frames(cond).flatten().tolist()
    assert mask == {"text": None, "several": [0, 0, 1]}.get(given, [0, 1, 1])


@torch.no_grad()
def test_features_are_those_of_the_clips_tokens(load):
    """Tokens of a last frame stand before them."""
    adapter, clip, t = load("0.9.7"), video(), torch.tensor([500.0])
    cond = adapter.with_image(conditions(adapter, 1)[0], clip[:, :, 0], last=clip[:, :, -1])
    features: dict[int, Tensor | None] = {1: None}
    adapter.forward("teacher", noise(1), t, cond, features=features)
    assert features[1] is not None
    assert features[1].shape == (1, 32, 3, 2, 3)
    own = {name: value for name, value in cond.tensors.items() if name != "last_latents"}
    other: dict[int, Tensor | None] = {1: None}
    adapter.forward("teacher", noise(1), t, Condition(own), features=other)
    assert other[1] is not None
    difference = (features[1] - other[1]).abs()
    assert 1e-4 < difference.max() < 1  # at the same places, of a clip that sees a frame more


def test_frames_that_do_not_fit_are_refused(load):
    clip = video()
    adapter = load("0.9.5")
    cond = conditions(adapter, 1)[0]
    for images, last, reason in (
        (clip[:, :, 0], clip[:, :, -1], "reads first ones alone"),
        (clip[:, :, :8], None, r"8k \+ 1"),
        (clip, None, "leaves nothing"),
        (clip[:, :, 0, :32], None, r"must be \[1, 3, 64, 96\]"),
    ):
        with pytest.raises(ConditioningError, match=reason):
            adapter.with_image(cond, images, last=last)
    pair = load("0.9.7").with_image(cond, clip[:, :, 0], last=clip[:, :, -1])
    with pytest.raises(ConditioningError, match="models of LTXPipeline read none"):
        adapter.forward("teacher", noise(1), torch.tensor([500.0]), pair)
    short = Condition({**cond.tensors, "image_latents": torch.zeros(1, 8, 3, 2, 3)})
    with pytest.raises(ConditioningError, match="K from 1 to 2"):
        adapter.forward("teacher", noise(1), torch.tensor([500.0]), short)


@pytest.mark.parametrize("backend", ["flash", "_native_flash", "sage_varlen", "_native_npu"])
def test_a_kernel_that_takes_no_mask_is_a_problem_with_its_reason(folder_of, backend):
    """The transformer hides the padding of the text by a bias, and these would raise in step 1."""
    path = str(folder_of("0.9.0"))
    role = RoleSpec(name="student", path=path, trainable=True, attention_backend=backend)
    (problem,) = PLUGIN.role_problems(role, CONFIG)
    assert problem.path == ("attention_backend",)
    assert f"{backend!r} cannot add a bias" in problem.message
    assert "Use one of flex, native, _native_cudnn, _native_efficient" in problem.message
    assert backend not in PLUGIN.attention_backends(role, CONFIG)


def test_plugin_and_adapter_have_the_same_fingerprint(load, folder_of):
    """Statistics are buffers of LTX's VAE, and have an entry of their own all the same."""
    adapter, source = load(), str(folder_of("0.9.0"))
    parts = {**adapter.latent_fingerprint(), **adapter.condition_fingerprint()}
    assert PLUGIN.fingerprint(CONFIG, source=source) == parts
    assert {"vae.statistics", "vae.weights", "text_encoder.weights"} < parts.keys()
    statistics = latent_statistics(Path(source) / "vae")
    mean = torch.tensor(statistics["latents_mean"]).view(1, -1, 1, 1, 1)
    assert torch.equal(mean, adapter._statistics.mean)
