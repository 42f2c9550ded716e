"""How a Wan text-to-video model is called.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from distill_protocols import (
    Capabilities,
    CapabilityError,
    Condition,
    ConditioningError,
    ContractError,
    ModelBundle,
    PredType,
    RoleHandle,
    RowGenerators,
    SamplerSpec,
    WeightsError,
)
from torch import Tensor

from distill_adapters_wan import flow, sampling
from distill_adapters_wan.calls import predicted, transformer_of
from distill_adapters_wan.capabilities import CAPABILITIES
from distill_adapters_wan.components import TextSide, VideoCodec
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.folders import fetch, read_json
from distill_adapters_wan.shape import clip_faults, latent_facts, latent_shape


class WanAdapter:
    """``DistillAdapter`` of Wan 2.1 text-to-video. A condition is ``{"text": [B, L, D]}``.

    Args:
        bundle: roles, each with a module ``transformer``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: ``source`` has no VAE configuration, or clip, VAE and transformer do not fit.
    """

    def __init__(self, bundle: ModelBundle, config: WanPipelineConfig, *, source: str) -> None:
        self._bundle = bundle
        self._config = config
        vae_folder = fetch(source, ("vae",)) / "vae"
        facts = latent_facts(vae_folder)
        for name, role in bundle.roles.items():
            for fault in clip_faults(config, facts, dict(transformer_of(role).config)):
                raise WeightsError(f"role {name!r} and the VAE of {source}: {fault}")
        self._latent_shape = latent_shape(config, facts)
        # Not of parameters: those of a role that waits its turn are on the CPU.
        device = next(
            (b.device for m in bundle.by_module("modules").values() for b in m.buffers()),
            torch.device("cpu"),
        )
        statistics = _latent_statistics(read_json(vae_folder / "config.json"))
        self._mean, self._std = (values.to(device) for values in statistics)
        self._codec = VideoCodec(source, device=device)
        self._text = TextSide(source, config, device=device)

    @property
    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    # -- noise schedule -----------------------------------------------------------------------

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See ``flow.add_noise``."""
        return flow.add_noise(x0, noise, t)

    def pred_to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        """See ``flow.pred_to_x0``."""
        return flow.pred_to_x0(pred, x_t, t, pred_type)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        """See ``flow.target``."""
        return flow.target(x0, noise, t, pred_type)

    # -- model calls --------------------------------------------------------------------------

    def forward(
        self,
        role: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        fwd_pred_type: PredType = "v",
        neg_cond: Condition | None = None,
        cfg: float | None = None,
        caches: Any | None = None,
        features: MutableMapping[int, Tensor] | None = None,
    ) -> Tensor:
        """The prediction of ``role`` [B, C, T, H, W], fp32; guidance ``u + w (c - u)`` in fp32.

        ``cfg`` of None or 1 calls the model on ``cond`` alone, 0 on ``neg_cond`` alone; any other
        costs two calls, or one of 2B (``cfg_batched``).

        Raises:
            ConditioningError: guidance without ``neg_cond``, or a condition of a wrong shape.
            CapabilityError: ``caches`` or ``features``.
        """
        if caches is not None or features is not None:
            asked = "caches" if caches is not None else "features"
            raise CapabilityError(
                f"forward was asked for {asked}, which the Wan adapter does not support (see its "
                "capabilities); a method must check them before its first step"
            )
        flow.sigma_of(t, x_t)  # refuses t that is rounded or of another shape
        handle = self._bundle[role]
        w = 1.0 if cfg is None else cfg
        v = self._guided(handle, x_t, t, cond, neg_cond, w, batched=self._config.cfg_batched)
        return flow.v_to_pred(v, x_t, t, fwd_pred_type).float()

    def _guided(
        self,
        role: RoleHandle,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        neg_cond: Condition | None,
        w: float,
        *,
        batched: bool,
    ) -> Tensor:
        if w == 1:
            return self._velocity(role, x_t, t, cond)
        if neg_cond is None:
            raise ConditioningError(
                f"guidance w = {w:g} of role {role.name!r} without a negative condition; only "
                "w = 1 (or none) needs none. Give the run a negative prompt or embedding"
            )
        negative = neg_cond.expand(x_t.shape[0])
        if w == 0:
            return self._velocity(role, x_t, t, negative)
        if batched:
            both = Condition.cat([cond.expand(x_t.shape[0]), negative])
            pair = self._velocity(role, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            conditional, unconditional = pair.chunk(2)
            return flow.guide(conditional, unconditional, w)
        return flow.guide(
            self._velocity(role, x_t, t, cond), self._velocity(role, x_t, t, negative), w
        )

    def _velocity(self, role: RoleHandle, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        text = self._checked_text(role, cond.expand(x_t.shape[0]))
        v = predicted(role, self.to_model_layout(x_t), t, text.to(x_t.device))
        return self.from_model_layout(v).float()

    def _checked_text(self, role: RoleHandle, cond: Condition) -> Tensor:
        if "text" not in cond.tensors:
            raise ConditioningError(
                f"the condition holds {sorted(cond.tensors)} but the Wan models read 'text' "
                "[B, L, D]; rebuild the data set with this family's encoder"
            )
        text = cond.tensors["text"]
        width = transformer_of(role).config["text_dim"]
        expected = (self._config.max_sequence_length, width)
        if tuple(text.shape[1:]) != expected:
            raise ConditioningError(
                f"text embeddings are {list(text.shape)}, they must be [B, {expected[0]}, "
                f"{expected[1]}] (max_sequence_length, the model's text_dim): Wan attends its "
                "padding, so another length gives other clips. Set "
                "pipeline_config.max_sequence_length to the data set's, or encode the data again"
            )
        return text

    # -- latents and pixels -------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one clip of this run."""
        return self._latent_shape

    def to_model_layout(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] is Wan's own layout."""
        return latents

    def from_model_layout(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] is Wan's own layout."""
        return latents

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """(z - mean) / std per channel, with the VAE's own statistics."""
        wide = latents if latents.dtype == torch.float64 else latents.float()
        return (wide - self._mean.to(wide)) / self._std.to(wide)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """z std + mean per channel, as ``WanPipeline`` computes it: bit for bit the same clips."""
        wide = latents if latents.dtype == torch.float64 else latents.float()
        return wide / (1.0 / self._std.to(wide)) + self._mean.to(wide)

    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, 3, F, H_px, W_px] in [0, 1] from normalised latents, without gradient."""
        return self._codec.decode(self.denormalize_latents(latents.detach()))

    def encode(self, video: Tensor) -> Tensor:
        """Raw (not normalised) latents of clips [B, 3, F, H_px, W_px] in [0, 1]: posterior mode."""
        return self._codec.encode(video)

    # -- text ---------------------------------------------------------------------------------

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """``{"text": [B, L, D]}`` fp32, padded to L = max_sequence_length with zeros."""
        return Condition({"text": self._text.encode(raw_cond)})

    def encode_neg_condition(self, raw_neg_cond: str) -> Condition:
        """One row."""
        return self.encode_condition([raw_neg_cond])

    def condition_fingerprint(self) -> str | None:
        """Hash of text encoder, tokenizer, padding and precision; None if not on this machine."""
        return self._text.fingerprint()

    def text_encoder_kept(self) -> AbstractContextManager[Any]:
        """Within: the text encoder stays loaded, for many encodings after each other.

        Outside, each encoding reads it and frees it again: no run must hold UMT5-XXL's 11 to
        23 GB beside its models because it encoded one prompt.
        """
        return self._text.kept()

    def free_components(self) -> None:
        """Drop the VAE from memory; the next use reads it again."""
        self._codec.free()

    def clear_caches(self, role: str) -> None:
        """Nothing to clear: this adapter keeps no key/value cache."""
        self._bundle.require_roles([role])

    # -- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        role: str,
        spec: SamplerSpec,
        noise: Tensor,
        cond: Condition,
        *,
        neg_cond: Condition | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        """Normalised clean latents [B, C, T, H, W]; see ``sampling.sample``.

        ``poll`` is called before each step; what it raises ends the sampling.

        Raises:
            ContractError: noise of another shape than the run's clips, or not one generator a row
                for a stochastic spec.
        """
        if tuple(noise.shape[1:]) != self._latent_shape:
            raise ContractError(
                f"noise is {list(noise.shape)}, it must be [B, "
                f"{', '.join(map(str, self._latent_shape))}] for this run's clips"
            )

        handle = self._bundle[role]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if poll is not None:
                poll()
            # Two calls for guidance, whatever cfg_batched says, as WanPipeline makes them: a call
            # of 2B rounds otherwise, and an export must give the same clip bit for bit.
            return self._guided(handle, x, t, cond, neg_cond, spec.guidance, batched=False)

        return sampling.sample(velocity, spec, noise, generators)


def _latent_statistics(vae_config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and std [1, C, 1, 1, 1] of raw latents."""
    try:
        mean, std = vae_config["latents_mean"], vae_config["latents_std"]
    except KeyError as error:
        raise WeightsError(
            f"vae/config.json has no {error}; without it latents cannot be normalised. Use the "
            "folder of a Wan VAE"
        ) from error
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(mean).view(shape), torch.tensor(std).view(shape)
