"""Configurations of models, read without trust: what a size, a depth or a flag may be. No torch.

A ``config.json`` describes how a module is built, so a wrong number in it is wrong everywhere:
in plans, in checks, and in a module with a billion blocks. Entries whose meaning is common to
diffusers and transformers are checked here by name; a class's own entries by the types of its
defaults when it is built (``distill_diffusers.building``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill_protocols import WeightsError
from distill_runtime import UnreadableFileError, read_json_object

MAX_LAYERS = 1000
"""Repeated blocks of one kind; the deepest published transformers have about a hundred."""
MAX_SIZE = 1 << 24
"""Channels, heads, positions, pixels, words."""
MAX_PATCH = 1024
MAX_ENTRIES = 10_000
"""Of a list."""
MAX_INTEGER = 1 << 53
"""Of any other number: what a float holds exactly."""

_DEPTH = re.compile(r"(?:^|_)(?:layers|blocks|depth)(?:_|$)")
_SIZES = frozenset(
    (
        "attention_head_dim", "base_dim", "caption_channels", "cross_attention_dim", "d_ff", "d_kv",
        "d_model", "ffn_dim", "freq_dim", "hidden_size", "image_size", "in_channels",
        "intermediate_size", "joint_attention_dim", "latent_channels", "num_channels", "num_heads",
        "pos_embed_max_size", "projection_dim", "rope_max_seq_len",
        "scale_factor_spatial", "scale_factor_temporal", "text_dim", "vocab_size", "z_dim",
    )
)  # fmt: skip
_OPTIONAL_SIZES = frozenset(
    (
        "added_kv_proj_dim", "caption_projection_dim", "decoder_base_dim", "image_dim",
        "max_position_embeddings", "num_attention_heads", "out_channels", "pooled_projection_dim",
        "pos_embed_seq_len", "sample_size", "spatial_compression_ratio",
        "temporal_compression_ratio",
    )
)  # fmt: skip
_LISTS = frozenset(("attention_head_dim", "cross_attention_dim", "num_attention_heads"))
"""Sizes that some classes take one of for each level."""
_PATCHES = frozenset(("patch_size", "patch_size_t"))
_FLAGS = frozenset(("spatio_temporal_scaling", "temperal_downsample"))
_STATISTICS = frozenset(("latents_mean", "latents_std"))


def read_config(file: Path) -> dict[str, object]:
    """Read the configuration of a model.

    Raises:
        WeightsError: missing, damaged, or with entries that no model has (all of them are named).
    """
    try:
        config = read_json_object(file)
    except UnreadableFileError as error:
        raise WeightsError(
            f"{error}; a Diffusers-format folder has it. Download the model again, or point to "
            "another folder"
        ) from error
    if problems := list(config_problems(config)):
        raise WeightsError(
            f"{file} describes no model: {'; '.join(problems)}. It is damaged or was edited; "
            "download it again"
        )
    return config


def read_integer(config: Mapping[str, object], name: str, default: int | None = None) -> int:
    """Take an entry such as a count of channels; ``default`` where it is absent or null.

    Raises:
        WeightsError: it is something else, or absent without a default.
    """
    value = _entry(config, name, default)
    if not isinstance(value, int):
        raise _wrong_entry(name, value, "a whole number")
    return value


def read_integers(
    config: Mapping[str, object], name: str, default: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Take a list such as a patch size, as ``read_integer`` does a number."""
    value = _entry(config, name, default)
    if not isinstance(value, list | tuple) or not all(isinstance(item, int) for item in value):
        raise _wrong_entry(name, value, "a list of whole numbers")
    return tuple(value)


def read_number(config: Mapping[str, object], name: str, default: float | None = None) -> float:
    """Take an entry such as a scaling factor, as ``read_integer`` does a whole number."""
    value = _entry(config, name, default)
    if not isinstance(value, int | float):
        raise _wrong_entry(name, value, "a number")
    return value


def config_problems(config: Mapping[str, object]) -> Iterator[str]:
    """Say which entries are nothing that a model can be built from."""
    for name, value in config.items():
        if not name.isprintable():  # libraries print the names that they do not know
            yield f"{name!a}: the name of an entry must be printable"
        values = value if isinstance(value, list) else [value]
        if problem := _problem(name, value, values):
            yield f"{name!a}: {_shown(value)} {problem}"


def _problem(name: str, value: object, values: list[Any]) -> str | None:
    if len(values) > MAX_ENTRIES:
        return f"has more than {MAX_ENTRIES} entries"
    if value is None and name in _OPTIONAL_SIZES | {"patch_size"}:  # Wan 2.1's VAE has no patches
        return None
    if name in _SIZES | _OPTIONAL_SIZES:
        if isinstance(value, list) and name not in _LISTS:
            return "must be one number"
        least, most = 1, MAX_SIZE
    elif name in _PATCHES:
        least, most = 1, MAX_PATCH
    # A list of layers may be empty (SD 3's dual_attention_layers), a number of them may not.
    elif (
        _DEPTH.search(name)
        and (values or name.startswith("num_"))
        and all(type(item) in (int, float) for item in values)
    ):
        least, most = (1 if name.startswith("num_") else 0), MAX_LAYERS
    else:
        return _other_problem(name, value, values)
    if not values or any(type(item) is not int or not least <= item <= most for item in values):
        return f"must be a whole number from {least} to {most:,}, or a list of such"
    return None


def _other_problem(name: str, value: object, values: list[Any]) -> str | None:
    if name in _FLAGS and not all(type(item) is bool for item in values):
        return "must be true or false, or a list of these"
    if name in _STATISTICS and value is not None and not _are_numbers(values):
        return "must be a list of numbers"
    if name == "scaling_factor" and not (_are_numbers(values) and all(v > 0 for v in values)):
        return "must be a number above 0"
    if name == "shift_factor" and not (value is None or _are_numbers([value])):
        return "must be a number"
    if any(type(item) is int and abs(item) > MAX_INTEGER for item in values):
        return f"must be at most {MAX_INTEGER:,}"
    return None


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(
        type(item) in (int, float) and math.isfinite(item) for item in values
    )


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _entry(config: Mapping[str, object], name: str, default: object) -> object:
    value = config.get(name)
    return default if value is None else value


def _wrong_entry(name: str, value: object, kind: str) -> WeightsError:
    state = "is missing" if value is None else f"is {_shown(value)}"
    return WeightsError(
        f"{name} {state} in the configuration of a model and must be {kind}, as its class cannot "
        "be built or called otherwise. Download the model again"
    )
