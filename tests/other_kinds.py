"""Model classes that no package here has a family for, to test what all classes share."""

from __future__ import annotations

from distill_diffusers.kinds import ModelKind

LTX = ModelKind(
    transformer="diffusers.models.transformers.transformer_ltx:LTXVideoTransformer3DModel",
    vae="diffusers.models.autoencoders.autoencoder_kl_ltx:AutoencoderKLLTXVideo",
    pipelines=("diffusers.pipelines.ltx.pipeline_ltx:LTXPipeline",),
    stored_like="scale_shift_table",
    foreign_layers={"q": "to_q"},
)
LTX_CONFIG = {
    "in_channels": 6,
    "out_channels": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 4,
    "caption_channels": 12,
}
