"""Wan's transformer class, as one value. No torch here."""

from __future__ import annotations

from types import MappingProxyType

from distill_diffusers.kinds import ModelKind

from distill_adapters_wan.experts import HIGH, LOW

WAN = ModelKind(
    transformer="diffusers.models.transformers.transformer_wan:WanTransformer3DModel",
    vae="diffusers.models.autoencoders.autoencoder_kl_wan:AutoencoderKLWan",
    pipelines=(
        "diffusers.pipelines.wan.pipeline_wan:WanPipeline",
        "diffusers.pipelines.wan.pipeline_wan_i2v:WanImageToVideoPipeline",
    ),
    modules=(HIGH, LOW),
    call_options=MappingProxyType({"boundary_ratio": None, "expand_timesteps": False}),
    stored_like="patch_embedding.weight",
    # All linear layers of a block but those of a picture's embedding: what musubi-tuner and
    # DiffSynth-Studio train of Wan.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    time_embedder="condition_embedder.time_embedder",
    time_features="condition_embedder.timesteps_proj",
    target_embedder="condition_embedder.delta_embedder",
    foreign_layers=MappingProxyType(
        {
            "q": "to_q",
            "k": "to_k",
            "v": "to_v",
            "o": "to_out.0",
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
        }
    ),
)
"""``boundary_ratio``: at ``t >= 1000 boundary_ratio`` ``transformer`` is called, below it
``transformer_2``; None: there is one transformer. ``expand_timesteps``: each token has a t of its
own, and a first frame that is given has 0."""
