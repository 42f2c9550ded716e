"""Clips for validation, sampled and predicted in the same way for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import field, frozen
from distill_protocols import (
    CapabilityError,
    CausalRollout,
    Condition,
    ConditioningProvider,
    Latents,
    LatentsT,
    ModelBundle,
    RowGenerators,
    SamplerSpec,
    SampleView,
    draw_noise,
    map_latents,
    one_tensor,
)
from torch import Tensor

from distill_methods.contracts import LatentDiffusion
from distill_methods.maths import standard_noise


@frozen(kw_only=True, eq=False)
class ViewSampler:
    """Samples what validation shows, and leaves weights, modes and generators as they are.

    Every view starts from the same noise, and two stochastic views re-noise with the same noise:
    row n of the prompts has a generator of its own (``RowGenerators.of_clips``), so its clip is the
    one that a stock pipeline makes after ``torch.manual_seed(seed + n)``.

    Attributes:
        default_spec: of the views that state no sampler.
        poll: called before each sampling step and each decoding (``StopFlag.poll``). Where it
            raises, sampling ends and all weights are as they were.
    """

    adapter: LatentDiffusion
    bundle: ModelBundle
    default_spec: SamplerSpec
    conditioning: ConditioningProvider
    poll: Callable[[], None] = field(default=lambda: None)

    def sample_clips(
        self,
        views: Sequence[SampleView],
        cond: Condition,
        *,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Sample and decode each view: clips [B, 3, F, H, W] in [0, 1] by view name, B rows of
        ``cond``.

        Args:
            rows: the places of the rows of ``cond`` among all prompts; None: 0 .. B - 1.

        Raises:
            RoleError: a view names a role that is not there, or EMA weights that nobody keeps.
            CapabilityError: the adapter cannot decode, or a role that shall make videos of another
                length is not causal.
            ConditioningError: a view samples with guidance and there is no negative condition.
        """
        self.adapter.capabilities.require(["supports_decode"], by="sampling for validation")
        rows = range(len(cond)) if rows is None else rows
        clips = {}
        for view in views:
            latents = self.sample_latents(view, cond, seed=seed, rows=rows)
            self.poll()
            if view.latent_frames is None:
                clips[view.name] = self.adapter.decode(latents)
            else:
                clips[view.name] = _decode_in_chunks(self.adapter, view, one_tensor(latents))
        return clips

    def sample_latents(
        self, view: SampleView, cond: Condition, *, seed: int, rows: Sequence[int]
    ) -> Latents:
        """Sample normalised latents [B, C, T, H, W] of one view. Arguments and errors are those of
        ``sample_clips``."""
        spec = view.sampler or self.default_spec
        generators = RowGenerators.of_clips(seed, rows)
        channels, frames, height, width = self.adapter.latent_shape
        shape = (channels, view.latent_frames or frames, height, width)
        role = self.bundle[view.role]
        device = role.call_device
        noise = draw_noise(self.adapter, shape, generators)
        reads_negative = self.adapter.capabilities.reads_negative(*spec.guidances)
        negative = self.conditioning.negative().to(device) if reads_negative else None
        with torch.no_grad(), role.frozen(), role.averaged(ema=view.ema):
            if view.latent_frames is None:
                return self.adapter.sample(
                    view.role,
                    spec,
                    map_latents(lambda tensor: tensor.to(device), noise),
                    cond.to(device),
                    neg_cond=negative,
                    generators=generators,
                    poll=self.poll,
                )
            causal = _require_causal(self.adapter, view)
            chunks = causal.chunks(view.role, view.latent_frames)
            parts = causal.stream(
                view.role,
                spec,
                (one_tensor(noise)[:, :, chunk.span].to(device) for chunk in chunks),
                cond.to(device),
                neg_cond=negative,
                generators=generators,
                poll=self.poll,
            )
            return torch.cat(list(parts), dim=2)

    def predict_latents(
        self,
        role: str,
        latents: LatentsT,
        t: float,
        cond: Condition,
        *,
        seed: int,
        rows: Sequence[int],
    ) -> LatentsT:
        """Return x0 [B, C, T, H, W] that ``role`` predicts of ``latents`` noised to ``t``, without
        guidance. The noise follows from ``seed`` and a row's place alone.

        Raises:
            RoleError: the role is not there.
            CapabilityError: the adapter cannot predict x0.
        """
        self.adapter.capabilities.require(["pred:x0"], by="showing predictions in validation")
        self.poll()
        handle = self.bundle[role]
        device = handle.call_device
        generators = RowGenerators.seeded(seed, "look.x0", rows)
        times = torch.full((len(latents),), t, device=device)
        clean = map_latents(lambda tensor: tensor.to(device), latents)
        noise = map_latents(
            lambda tensor: standard_noise(tensor.shape[1:], generators, device), clean
        )
        x_t = self.adapter.add_noise(clean, noise, times)
        with torch.no_grad(), handle.frozen():
            return self.adapter.forward(role, x_t, times, cond.to(device), fwd_pred_type="x0")


def _decode_in_chunks(adapter: LatentDiffusion, view: SampleView, latents: Tensor) -> Tensor:
    causal = _require_causal(adapter, view)
    parts = [latents[:, :, c.span] for c in causal.chunks(view.role, latents.shape[2])]
    with torch.no_grad():
        # Frames leave the device as they are made: a long video would not fit beside the models.
        return torch.cat([clip.cpu() for clip in causal.decode_stream(parts)], dim=2)


def _require_causal(adapter: LatentDiffusion, view: SampleView) -> CausalRollout:
    causal = adapter.causal
    if causal is None or view.role not in adapter.capabilities.causal_roles:
        raise CapabilityError(
            f"view {view.name!r} asks for {view.latent_frames} latent frames of {view.role!r}, "
            "which makes a clip as a whole, of the length that it was trained on. Only a causal "
            "role makes videos of any length; leave latent_frames out"
        )
    return causal
