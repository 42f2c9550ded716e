"""The model class of the Wan family. No torch here."""

from types import MappingProxyType

from distill_diffusers.kinds import ModelKind

WAN = ModelKind(
    transformer="diffusers.models.transformers.transformer_wan:WanTransformer3DModel",
    vae="diffusers.models.autoencoders.autoencoder_kl_wan:AutoencoderKLWan",
    pipelines=(
        "diffusers.pipelines.wan.pipeline_wan:WanPipeline",
        "diffusers.pipelines.wan.pipeline_wan_i2v:WanImageToVideoPipeline",
    ),
    modules=("transformer", "transformer_2"),
    stored_like="patch_embedding.weight",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    block_lists=("blocks",),
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
