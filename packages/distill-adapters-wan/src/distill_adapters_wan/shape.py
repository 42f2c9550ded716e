"""Do clip, VAE and transformer fit together? Numbers only, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.folders import read_json
from distill_adapters_wan.published import LatentFacts


def latent_facts(vae_folder: Path) -> LatentFacts:
    """From ``vae/config.json`` (absent keys: Wan 2.1's, which is diffusers' default)."""
    config = read_json(vae_folder / "config.json")
    return LatentFacts(
        channels=config.get("z_dim", 16),
        stride_t=config.get("scale_factor_temporal", 4),
        stride_hw=config.get("scale_factor_spatial", 8),
    )


def latent_shape(config: WanPipelineConfig, facts: LatentFacts) -> tuple[int, int, int, int]:
    """(C, T, H, W) of one clip."""
    return (
        facts.channels,
        (config.num_frames - 1) // facts.stride_t + 1,
        config.height // facts.stride_hw,
        config.width // facts.stride_hw,
    )


def unsupported(transformers: Mapping[str, Mapping[str, Any]], expand: bool) -> Iterator[str]:
    """Wan variants that this version of the adapter does not train."""
    if len(transformers) > 1:
        yield (
            f"it has {len(transformers)} experts ({', '.join(transformers)}); this version of the "
            "adapter routes no experts. Use a Wan 2.1 text-to-video model"
        )
    main = transformers.get("transformer", {})
    taken, given = main.get("in_channels", 16), main.get("out_channels", 16)
    if taken != given:
        yield (
            f"its transformer takes {taken} channels and returns {given}: an image-to-video model, "
            "which this version of the adapter cannot condition. Use a text-to-video model"
        )
    if expand:
        yield (
            "it uses one timestep a token (expand_timesteps), which this version of the adapter "
            "does not give. Use a Wan 2.1 text-to-video model"
        )


def clip_faults(
    config: WanPipelineConfig, facts: LatentFacts, transformer: Mapping[str, Any]
) -> Iterator[str]:
    """Where the clip of ``config`` does not fit a VAE and a transformer."""
    patch = tuple(transformer.get("patch_size", (1, 2, 2)))
    channels = transformer.get("in_channels", 16)
    longest = transformer.get("rope_max_seq_len", 1024)
    if channels != facts.channels:
        yield (
            f"the transformer takes {channels} latent channels but the VAE makes {facts.channels}; "
            "they must be of one model family. Set pipeline_config.components to the right folder"
        )
    if (config.num_frames - 1) % facts.stride_t:
        yield (
            f"num_frames {config.num_frames} must be {facts.stride_t}k + 1: this VAE folds "
            f"{facts.stride_t} frames into one after the first"
        )
    sizes = {"height": (config.height, patch[1]), "width": (config.width, patch[2])}
    for name, (pixels, patch_size) in sizes.items():
        unit = facts.stride_hw * patch_size
        if pixels % unit:
            yield (
                f"{name} {pixels} must be divisible by {unit}: VAE stride {facts.stride_hw} x "
                f"patch {patch_size}"
            )
    _, frames, height, width = latent_shape(config, facts)
    if frames % patch[0]:
        yield f"{frames} latent frames must be divisible by the temporal patch {patch[0]}"
    cells = (frames // patch[0], height // patch[1], width // patch[2])
    if max(cells) > longest:
        yield (
            f"the clip makes {cells[0]}x{cells[1]}x{cells[2]} tokens, but the transformer has "
            f"positions for {longest} along an axis (rope_max_seq_len); make the clip smaller"
        )
