"""Whether clip, VAE and transformer fit together. Numbers only, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distill_diffusers.descriptions import LatentInfo, ModelDescription, as_json
from distill_diffusers.model_configs import read_integer, read_integers

from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.images.shapes import MASK_CHANNELS, PAIR_TOKENS, reads_pairs

TEXT_TOKENS = 512
"""Fixed in diffusers' attention, which separates text from a picture's embedding by it."""


def latent_info(vae: Mapping[str, object]) -> LatentInfo:
    """Read off ``vae/config.json`` (absent keys: Wan 2.1's)."""
    return LatentInfo.of_wan_vae(vae)


def unsupported(model: ModelDescription, boundary_ratio: float | None = None) -> Iterator[str]:
    """Say why this adapter would call the model wrongly; ``boundary_ratio`` is the run's own."""
    yield from _expert_problems(model, boundary_ratio)
    expand_timesteps = model.call_options["expand_timesteps"]
    for name, config in model.transformers.items():
        patch = config.get("patch_size", (1, 2, 2))
        if not isinstance(patch, list | tuple) or len(patch) != 3:
            yield (
                f"{name} has patch_size {patch}, which must be three numbers: time, "
                "height, width. Use a Wan 2.1 or 2.2 model"
            )
            continue
        inputs, outputs = (read_integer(config, n, 16) for n in ("in_channels", "out_channels"))
        if inputs not in (outputs, 2 * outputs + MASK_CHANNELS):
            yield (
                f"{name} takes {inputs} channels and returns {outputs}: neither a text-to-video "
                f"model ({outputs}) nor one that reads a first frame "
                f"({2 * outputs + MASK_CHANNELS}: latents, mask, picture). Use a Wan 2.1 or 2.2 "
                "model of one of these kinds"
            )
        elif inputs == outputs and config.get("image_dim") is not None:
            yield (
                f"{name} reads the embedding of a picture but no latents of it, as none of the "
                "published Wan models does. Use a text-to-video or an image-to-video model"
            )
        elif inputs != outputs and expand_timesteps:
            yield (
                f"{name} takes a picture as channels, and its pipeline gives one as a first frame "
                "too (expand_timesteps); a model has one of the two. Mend model_index.json"
            )
        tokens = config.get(PAIR_TOKENS)
        if tokens is not None and (inputs == outputs or read_integer(config, PAIR_TOKENS) % 2):
            yield (
                f"{name} has positions for {tokens} tokens of a first and a last frame "
                f"({PAIR_TOKENS}); there must be as many of each, in a model that reads a picture "
                "as channels. Use a model of first and last frames (FLF2V) as it was published"
            )


def pair_problem(transformer: Mapping[str, object], tokens: int) -> str | None:
    """Say why an image encoder that makes ``tokens`` of a picture does not fit the transformer."""
    expected = transformer.get(PAIR_TOKENS)
    if not reads_pairs(transformer) or expected == 2 * tokens:
        return None
    return (
        f"the transformer has positions for {expected} tokens of two pictures ({PAIR_TOKENS}), and "
        f"the image encoder makes {tokens} of each. Use the image encoder of the same model"
    )


def _expert_problems(model: ModelDescription, boundary_ratio: float | None) -> Iterator[str]:
    first, *others = model.transformers.items()
    for name, config in others:
        differ = [
            f"{key} {config.get(key)} and {first[1].get(key)}"
            for key in sorted(config.keys() | first[1].keys())
            if not key.startswith("_") and as_json(config.get(key)) != as_json(first[1].get(key))
        ]
        if differ:
            yield (
                f"its experts are of two architectures ({name}: {'; '.join(differ)}); both must "
                "read the same latents and conditions. Use the two of one model"
            )
    own = model.call_options["boundary_ratio"]
    if others and own is None and boundary_ratio is None:
        yield (
            f"it has two experts ({', '.join(model.transformers)}) and its model_index.json has "
            "no boundary_ratio, so which is called when is not known. Give the run's own "
            "boundary_ratio (Wan 2.2: 0.875 for text, 0.9 for images)"
        )
    if not others and own is not None:
        yield (
            f"its model_index.json has boundary_ratio {own:g} and a single "
            "transformer; below that noise level nothing would be called. Use the whole model, or "
            "take boundary_ratio out of its index"
        )


def clip_problems(
    config: WanPipelineConfig, info: LatentInfo, transformer: Mapping[str, object]
) -> Iterator[str]:
    """Say where the clip of ``config`` does not fit a VAE and a transformer."""
    patch = read_integers(transformer, "patch_size", (1, 2, 2))
    channels = read_integer(transformer, "out_channels", 16)
    longest = read_integer(transformer, "rope_max_seq_len", 1024)
    if channels != info.channels:
        yield (
            f"the transformer makes {channels} latent channels but the VAE makes {info.channels}; "
            "they must be of one model family. Take both from one, or name the right `components`"
        )
    if transformer.get("image_dim") is not None and config.max_sequence_length != TEXT_TOKENS:
        yield (
            f"max_sequence_length {config.max_sequence_length} must be {TEXT_TOKENS}: a model that "
            "reads the embedding of a picture takes just as many of its tokens for text"
        )
    if (config.num_frames - 1) % info.stride_t:
        yield (
            f"num_frames {config.num_frames} must be {info.stride_t}k + 1: this VAE folds "
            f"{info.stride_t} frames into one after the first"
        )
    sizes = {"height": (config.height, patch[1]), "width": (config.width, patch[2])}
    for name, (pixels, patch_size) in sizes.items():
        unit = info.stride_hw * patch_size
        if pixels % unit:
            yield (
                f"{name} {pixels} must be divisible by {unit}: VAE stride {info.stride_hw} x "
                f"patch {patch_size}"
            )
    _, frames, height, width = info.shape(config.num_frames, config.height, config.width)
    if frames % patch[0]:
        yield f"{frames} latent frames must be divisible by the temporal patch {patch[0]}"
    cells = (frames // patch[0], height // patch[1], width // patch[2])
    if max(cells) > longest:
        yield (
            f"the clip makes {cells[0]}x{cells[1]}x{cells[2]} tokens, but the transformer has "
            f"positions for {longest} along an axis (rope_max_seq_len); make the clip smaller"
        )
