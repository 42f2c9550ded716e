"""The base adapter on two transformer classes: LTX-Video (packed tokens) and SD 3 (images)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from distill_diffusers.adapter import FlowMatchingAdapter, LatentStatistics, VelocityCall
from distill_diffusers.calls.features import FeatureLayout
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.components.codec import ImageCodec, VideoCodec
from distill_diffusers.kinds import ModelKind
from distill_diffusers.roles.discriminator import Heads
from distill_protocols import (
    Capabilities,
    CapabilityError,
    ChunkCall,
    Condition,
    ConditioningError,
    ContractError,
    DiscriminatorSpec,
    DistillAdapter,
    ModelBundle,
    RoleHandle,
    SamplerSpec,
)
from torch import Tensor

LTX = ModelKind(
    transformer="diffusers.models.transformers.transformer_ltx:LTXVideoTransformer3DModel",
    vae="diffusers.models.autoencoders.autoencoder_kl_ltx:AutoencoderKLLTXVideo",
    pipelines=("diffusers.pipelines.ltx.pipeline_ltx:LTXPipeline",),
    stored_like="scale_shift_table",
)
SD3 = ModelKind(
    transformer="diffusers.models.transformers.transformer_sd3:SD3Transformer2DModel",
    vae="diffusers.models.autoencoders.autoencoder_kl:AutoencoderKL",
    pipelines=(
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3:"
        "StableDiffusion3Pipeline",
    ),
    stored_like="pos_embed.proj.weight",
)
CAPABILITIES = Capabilities(supports_cfg=True, supports_features=True, supports_jvp=True)
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class LtxAdapter(FlowMatchingAdapter):
    """Latents are packed to [B, L, C]; the text has a mask."""

    def predict_velocity(
        self,
        role: RoleHandle,
        module: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        with call_in_precision(role, module, LTX, x_t.device) as dtype:
            (v,) = role.modules[module](
                hidden_states=self.to_model_layout(x_t).to(dtype),
                encoder_hidden_states=cond.tensors["text"].to(x_t.device, dtype),
                encoder_attention_mask=cond.tensors["text_mask"].to(x_t.device),
                timestep=t[:, None],
                num_frames=x_t.shape[2],
                height=x_t.shape[3],
                width=x_t.shape[4],
                return_dict=False,
            )
        return self.from_model_layout(v.float())

    def to_model_layout(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def from_model_layout(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, self.latent_shape[1:])

    def feature_layout(self, role: RoleHandle, module: str, x_t: Tensor) -> FeatureLayout:
        return FeatureLayout(blocks="transformer_blocks", patches=x_t.shape[2:])

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        raise NotImplementedError


class Sd3Adapter(FlowMatchingAdapter):
    """An image model with a pooled text embedding; guidance is rescaled to the norm of c."""

    def predict_velocity(
        self,
        role: RoleHandle,
        module: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        with call_in_precision(role, module, SD3, x_t.device) as dtype:
            (v,) = role.modules[module](
                hidden_states=x_t.squeeze(2).to(dtype),
                encoder_hidden_states=cond.tensors["text"].to(dtype),
                pooled_projections=cond.tensors["pooled"].to(dtype),
                timestep=t,
                return_dict=False,
            )
        return v.float().unsqueeze(2)

    def combine_guidance(
        self, cond: Tensor, uncond: Tensor, w: float, x_t: Tensor, t: Tensor
    ) -> Tensor:
        guided = super().combine_guidance(cond, uncond, w, x_t, t)
        return guided * cond.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)

    def feature_layout(self, role: RoleHandle, module: str, x_t: Tensor) -> FeatureLayout:
        # Joint blocks return (text, image).
        patches = (1, x_t.shape[3] // 2, x_t.shape[4] // 2)
        return FeatureLayout(blocks="transformer_blocks", patches=patches, output=1)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        raise NotImplementedError


def adapter_of(
    adapter_class: type[FlowMatchingAdapter],
    kind: ModelKind,
    transformer: torch.nn.Module,
    shape: tuple[int, int, int, int],
    precision: Any = "fp32",
    capabilities: Capabilities = CAPABILITIES,
) -> FlowMatchingAdapter:
    role = RoleHandle(
        name="teacher", modules={"transformer": transformer}, precision=precision, device=CPU
    )
    ones = (1.0,) * shape[0]
    return adapter_class(
        ModelBundle({"teacher": role}),
        kind=kind,
        capabilities=capabilities,
        latent_shape=shape,
        statistics=LatentStatistics.of_channels([0.5] * shape[0], [2 * one for one in ones]),
        codec=VideoCodec(kind.vae, "nowhere", strides=(8, 32), device=CPU),
        encoders=None,
    )


@pytest.fixture(scope="module")
def ltx() -> FlowMatchingAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, num_layers=2, caption_channels=6,
        )  # fmt: skip
    return adapter_of(LtxAdapter, LTX, transformer, (4, 2, 2, 3))


@pytest.fixture(scope="module")
def sd3() -> FlowMatchingAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=16,
            pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
        )  # fmt: skip
    return adapter_of(Sd3Adapter, SD3, transformer, (4, 1, 4, 6))


def ltx_cond(rows: int, seed: int = 1) -> Condition:
    mask = torch.ones(rows, 5)
    mask[:, 3 + seed % 2 :] = 0
    return Condition({"text": normal(rows, 5, 6, seed=seed), "text_mask": mask})


def sd3_cond(rows: int, seed: int = 1) -> Condition:
    return Condition(
        {"text": normal(rows, 5, 6, seed=seed), "pooled": normal(rows, 10, seed=seed + 9)}
    )


TIMES = torch.tensor([900.0, 333.3])


def proves_the_contract(adapter: FlowMatchingAdapter) -> DistillAdapter:
    return adapter  # for the type checker


@torch.no_grad()
def test_packed_predictions_are_unpacked_to_their_cells(ltx):
    """Each cell of v is what the transformer gives for that cell's token."""
    x_t, cond = normal(2, 4, 2, 2, 3), ltx_cond(2)
    v = ltx.forward("teacher", x_t, TIMES, cond)
    (tokens,) = ltx._bundle["teacher"].modules["transformer"](
        x_t.permute(0, 2, 3, 4, 1).reshape(2, 12, 4), cond.tensors["text"],
        timestep=TIMES[:, None], encoder_attention_mask=cond.tensors["text_mask"],
        num_frames=2, height=2, width=3, return_dict=False,
    )  # fmt: skip
    assert torch.equal(v, tokens.reshape(2, 2, 2, 3, 4).permute(0, 4, 1, 2, 3))
    x0 = ltx.forward("teacher", x_t, TIMES, cond, fwd_pred_type="x0")
    assert torch.equal(x0, x_t - (TIMES / 1000).view(2, 1, 1, 1, 1) * v)


@torch.no_grad()
@pytest.mark.parametrize("batched", [True, False])
def test_masks_of_both_conditions_reach_their_calls(ltx, batched, monkeypatch):
    monkeypatch.setattr(ltx, "_batch_guidance", batched)
    x_t, cond, negative = normal(2, 4, 2, 2, 3), ltx_cond(2), ltx_cond(1, seed=2)
    guided = ltx.forward("teacher", x_t, TIMES, cond, neg_cond=negative, cfg=3.0)
    c = ltx.forward("teacher", x_t, TIMES, cond)
    u = ltx.forward("teacher", x_t, TIMES, negative)
    torch.testing.assert_close(guided, u + 3.0 * (c - u))


@torch.no_grad()
def test_a_familys_guidance_is_used_in_training_and_in_sampling(sd3):
    x_t, cond, negative = normal(2, 4, 1, 4, 6), sd3_cond(2), sd3_cond(1, seed=2)
    t = torch.full((2,), 1000.0)
    guided = sd3.forward("teacher", x_t, t, cond, neg_cond=negative, cfg=4.0)
    conditional = sd3.forward("teacher", x_t, t, cond)
    torch.testing.assert_close(guided.norm(dim=1), conditional.norm(dim=1))
    clip = sd3.sample("teacher", SamplerSpec(steps=1, guidance=4.0), x_t, cond, neg_cond=negative)
    torch.testing.assert_close(clip, x_t - guided)


@pytest.mark.parametrize("family", ["ltx", "sd3"])
def test_features_are_what_the_blocks_give(family, request):
    adapter = request.getfixturevalue(family)
    shape, cond = adapter.latent_shape, (ltx_cond if family == "ltx" else sd3_cond)(2)
    grid = shape[1:] if family == "ltx" else (1, 2, 3)
    x_t = normal(2, *shape).requires_grad_()
    transformer = adapter._bundle["teacher"].modules["transformer"]
    seen: list[Any] = []
    hook = transformer.transformer_blocks[1].register_forward_hook(
        lambda *args: seen.append(args[2])
    )
    features: dict[int, Tensor | None] = {1: None}
    plain = adapter.forward("teacher", x_t, TIMES, cond)
    assert torch.equal(adapter.forward("teacher", x_t, TIMES, cond, features=features), plain)
    hook.remove()
    tokens = seen[-1] if family == "ltx" else seen[-1][1]
    expected = torch.stack(
        [tokens[:, i].reshape(2, -1) for i in range(tokens.shape[1])], dim=-1
    ).reshape(2, 16, *grid)
    actual = features[1]
    assert actual is not None
    assert torch.equal(actual, expected)
    actual.square().sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.abs().max() > 0
    with pytest.raises(ContractError, match="block 2"):
        adapter.forward("teacher", x_t, TIMES, cond, features={2: None})


@pytest.mark.parametrize("family", ["ltx", "sd3"])
def test_a_derivative_is_the_limit_of_differences(family, request):
    adapter = request.getfixturevalue(family)
    cond = (ltx_cond if family == "ltx" else sd3_cond)(2)
    x_t, dx = normal(2, *adapter.latent_shape), normal(2, *adapter.latent_shape, seed=5)
    dt, step = torch.tensor([-100.0, 50.0]), 1e-3
    v, tangent = adapter.forward_jvp("teacher", x_t, TIMES, cond, dx=dx, dt=dt)
    with torch.no_grad():
        ahead, behind = (
            adapter.forward("teacher", x_t + h * dx, TIMES + h * dt, cond) for h in (step, -step)
        )
        torch.testing.assert_close(v, adapter.forward("teacher", x_t, TIMES, cond))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_sampling_is_the_stock_schedulers(sd3):
    """By an Euler loop as StableDiffusion3Pipeline has it."""
    noise, cond = normal(2, 4, 1, 4, 6), sd3_cond(2)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = noise
    for t in scheduler.timesteps:
        v = sd3.forward("teacher", x, t.expand(2), cond)
        x = scheduler.step(v, t, x, return_dict=False)[0]
    steps: list[int] = []
    clip = sd3.sample(
        "teacher", SamplerSpec(steps=4, shift=3.0), noise, cond,
        on_step=lambda step, x: steps.append(step),
    )  # fmt: skip
    torch.testing.assert_close(clip, x)
    assert steps == [0, 1, 2, 3]


def test_a_rollout_has_gradient_through_its_exit_step_alone(ltx):
    noise, cond = normal(1, 4, 2, 2, 3).requires_grad_(), ltx_cond(1)
    spec = SamplerSpec(steps=3)
    out = ltx.rollout("teacher", spec, noise, cond, exit_steps=[1])
    assert not out.requires_grad  # the role is frozen, and earlier steps have no gradient
    with pytest.raises(ContractError, match="2 exit_steps and 1 requires_grad for 1 chunks"):
        ltx.rollout("teacher", spec, noise, cond, exit_steps=[0, 1])


def test_precision_is_that_of_the_stored_parameter(ltx):
    """bf16 weights are called without autocast, fp32 ones under it, whatever surrounds the call."""
    role = ltx._bundle["teacher"]
    narrow = RoleHandle(name="a", modules=role.modules, precision="bf16")
    with call_in_precision(narrow, "transformer", LTX, CPU) as dtype:
        assert dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    stored = torch.nn.Module()
    stored.scale_shift_table = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    narrow = RoleHandle(name="a", modules={"transformer": stored}, precision="bf16")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        call_in_precision(narrow, "transformer", LTX, CPU) as dtype,
    ):
        assert dtype == torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")


def test_latents_are_normalised_by_the_statistics_and_back(ltx):
    raw = normal(2, 4, 2, 2, 3)
    normalised = ltx.normalize_latents(raw)
    torch.testing.assert_close(normalised, (raw - 0.5) / 2)
    torch.testing.assert_close(ltx.denormalize_latents(normalised), raw)


def test_what_an_adapter_lacks_is_none_and_calls_of_it_are_refused(ltx):
    x_t, cond = normal(2, 4, 2, 2, 3), ltx_cond(2)
    assert ltx.causal is ltx.experts is ltx.images is None
    assert ltx.discriminators is ltx.tangents is ltx
    with pytest.raises(CapabilityError, match="frame_times"):
        ltx.forward("teacher", x_t, TIMES[:, None].expand(2, 2), cond)
    with pytest.raises(CapabilityError, match="sees whole clips"):
        ltx.forward("teacher", x_t, TIMES, cond, caches=ChunkCall(first_frame=0))
    with pytest.raises(ConditioningError, match="without a negative condition"):
        ltx.forward("teacher", x_t, TIMES, cond, cfg=2.0)
    with pytest.raises(ContractError, match="guidance_2"):
        ltx.sample("teacher", SamplerSpec(steps=1, guidance_2=2.0), x_t, cond)
    transformer = ltx._bundle["teacher"].modules["transformer"]
    plain = adapter_of(LtxAdapter, LTX, transformer, (4, 2, 2, 3), capabilities=Capabilities())
    assert plain.discriminators is plain.tangents is None
    with pytest.raises(CapabilityError, match="features"):
        plain.forward("teacher", x_t, TIMES, cond, features={0: None})


def test_an_image_vae_is_called_on_images():
    class Vae:
        def decode(self, latents: Tensor) -> Any:
            assert latents.shape == (2, 4, 3, 5)
            return type("Output", (), {"sample": latents[:, :3].repeat(1, 1, 8, 8)})

    codec = ImageCodec("a:B", "nowhere", strides=(1, 8), device=CPU)
    codec._vae = Vae()
    clip = codec.decode(normal(2, 4, 1, 3, 5))
    assert clip.shape == (2, 3, 1, 24, 40)
    assert clip.min() >= 0
    assert clip.max() <= 1


def test_each_head_reads_the_features_of_its_own_block():
    torch.manual_seed(0)
    heads = Heads(4, DiscriminatorSpec(on="teacher", blocks=(0, 2), width=4))
    first, second = torch.randn(2, 3, 4, 2, 4, 4)
    one, other = heads([first, second]), heads([first, -second])
    assert one.shape == (3, 2)
    assert torch.equal(one[:, 0], other[:, 0])
    assert not torch.isclose(one[:, 1], other[:, 1]).any()
    with pytest.raises(ValueError, match="shorter"):
        heads([first])
