"""Do clip, VAE and transformer fit together? Numbers only, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_diffusers.folders import read_json

from distill_adapters_wan.architecture import Calling
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.published import LatentFacts

MASK_CHANNELS = 4
"""Beside a picture's latents: which of the four pixel frames of a latent frame are given."""
TEXT_TOKENS = 512
"""Wired into diffusers' attention where it tells text from a picture's embedding."""


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


def unsupported(
    transformers: Mapping[str, Mapping[str, Any]],
    calling: Calling,
    boundary_ratio: float | None = None,
) -> Iterator[str]:
    """Why this adapter would call the model wrongly; ``boundary_ratio`` is the run's own."""
    yield from _expert_problems(transformers, calling, boundary_ratio)
    for name, config in transformers.items():
        taken, given = config.get("in_channels", 16), config.get("out_channels") or 16
        if taken not in (given, 2 * given + MASK_CHANNELS):
            yield (
                f"{name} takes {taken} channels and returns {given}: neither a text-to-video "
                f"model ({given}) nor one that reads a first frame ({2 * given + MASK_CHANNELS}: "
                "latents, mask, picture). Use a Wan 2.1 or 2.2 model of one of these kinds"
            )
        elif taken == given and config.get("image_dim") is not None:
            yield (
                f"{name} reads the embedding of a picture but no latents of it, as none of the "
                "published Wan models does. Use a text-to-video or an image-to-video model"
            )
        elif taken != given and calling.expand_timesteps:
            yield (
                f"{name} takes a picture as channels, and its pipeline gives one as a first frame "
                "too (expand_timesteps); a model has one of the two. Mend model_index.json"
            )
        if config.get("pos_embed_seq_len") is not None:
            yield (
                f"{name} reads a first and a last frame (pos_embed_seq_len); this adapter gives a "
                "first frame alone. Use an image-to-video model"
            )


def _expert_problems(
    transformers: Mapping[str, Mapping[str, Any]], calling: Calling, boundary_ratio: float | None
) -> Iterator[str]:
    first, *others = transformers.values()
    for name, config in list(transformers.items())[1:]:
        differ = [
            f"{key} {config.get(key)} and {first.get(key)}"
            for key in sorted(config.keys() | first.keys())
            if not key.startswith("_") and plain(config.get(key)) != plain(first.get(key))
        ]
        if differ:
            yield (
                f"its experts are of two architectures ({name}: {'; '.join(differ)}); both must "
                "read the same latents and conditions. Use the two of one model"
            )
    if others and calling.boundary_ratio is None and boundary_ratio is None:
        yield (
            f"it has two experts ({', '.join(transformers)}) and its model_index.json has no "
            "boundary_ratio, so which is called when is not known. Write "
            "pipeline_config.boundary_ratio (Wan 2.2: 0.875 for text, 0.9 for images)"
        )
    if not others and calling.boundary_ratio is not None:
        yield (
            f"its model_index.json has boundary_ratio {calling.boundary_ratio:g} and a single "
            "transformer; below that noise level nothing would be called. Use the whole model, or "
            "take boundary_ratio out of its index"
        )


def plain(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def clip_problems(
    config: WanPipelineConfig, facts: LatentFacts, transformer: Mapping[str, Any]
) -> Iterator[str]:
    """Where the clip of ``config`` does not fit a VAE and a transformer."""
    patch = tuple(transformer.get("patch_size", (1, 2, 2)))
    channels = transformer.get("out_channels") or 16
    longest = transformer.get("rope_max_seq_len", 1024)
    if channels != facts.channels:
        yield (
            f"the transformer makes {channels} latent channels but the VAE makes {facts.channels}; "
            "they must be of one model family. Set pipeline_config.components to the right folder"
        )
    if transformer.get("image_dim") is not None and config.max_sequence_length != TEXT_TOKENS:
        yield (
            f"max_sequence_length {config.max_sequence_length} must be {TEXT_TOKENS}: a model that "
            "reads the embedding of a picture takes just as many of its tokens for text"
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
