"""How the model of a path is built and called, from its folder or from published numbers.

Nothing here imports torch or reads weights: run files are checked against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from attrs import Attribute, evolve, field, frozen
from distill_protocols import RoleSpec, TargetTimeSpec, WeightsError

from distill_diffusers.folders import (
    folder_hint,
    folder_problem,
    is_hub_id,
    locate,
    read_json,
    transformer_names,
)
from distill_diffusers.kinds import TARGET_GATE, TRAIN_STEPS, ModelKind
from distill_diffusers.model_configs import MAX_SIZE, read_config, read_integer, read_integers


def _check_latent_size(_info: object, attribute: Attribute[int], value: int) -> None:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise WeightsError(
            f"the VAE's configuration makes {attribute.name} {value!a:.80} of its latents, which "
            f"must be a whole number from 1 to {MAX_SIZE:,}. Use the folder of a whole VAE"
        )


@frozen(kw_only=True)
class LatentInfo:
    """What a VAE makes of pixels.

    Attributes:
        channels: of a latent cell.
        stride_t: frames of pixels that a latent frame holds; the first frame stands alone. 1 for
            images.
        stride_hw: pixels that a latent cell spans in height and in width.
    """

    channels: int = field(validator=_check_latent_size)
    stride_t: int = field(default=1, validator=_check_latent_size)
    stride_hw: int = field(default=8, validator=_check_latent_size)

    def shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of one clip, given in pixels."""
        frames = (num_frames - 1) // self.stride_t + 1
        return self.channels, frames, height // self.stride_hw, width // self.stride_hw

    @classmethod
    def of_wan_vae(cls, vae: Mapping[str, object]) -> LatentInfo:
        """Read it off ``vae/config.json`` of an ``AutoencoderKLWan`` (absent keys: Wan 2.1's, which
        are diffusers' defaults)."""
        return cls(
            channels=read_integer(vae, "z_dim", 16),
            stride_t=read_integer(vae, "scale_factor_temporal", 4),
            stride_hw=read_integer(vae, "scale_factor_spatial", 8),
        )

    @classmethod
    def of_ltx_vae(cls, vae: Mapping[str, object], scaled: tuple[bool, ...]) -> LatentInfo:
        """Read it off ``vae/config.json`` of an ``AutoencoderKLLTXVideo`` or
        ``AutoencoderKLLTX2Video``, as the class computes it.

        Args:
            scaled: the class's default of ``spatio_temporal_scaling``.
        """
        halvings = sum(read_integers(vae, "spatio_temporal_scaling", scaled))
        stride_t = read_integer(vae, "temporal_compression_ratio", 0)
        stride_hw = read_integer(vae, "spatial_compression_ratio", 0)
        return cls(
            channels=read_integer(vae, "latent_channels", 128),
            stride_t=stride_t or read_integer(vae, "patch_size_t", 1) * 2**halvings,
            stride_hw=stride_hw or read_integer(vae, "patch_size", 4) * 2**halvings,
        )

    def channel_problems(self, transformer: Mapping[str, object], default: int) -> Iterator[str]:
        """Say where a transformer takes or makes other channels than the VAE.

        Args:
            default: the class's default of ``in_channels`` and ``out_channels``.
        """
        names = ("in_channels", "out_channels")
        channels = {read_integer(transformer, name, default) for name in names}
        if channels != {self.channels}:
            yield (
                f"the transformer has {' and '.join(map(str, sorted(channels)))} latent channels "
                f"but the VAE {self.channels}; they must be of one model family. Take both from "
                "one, or name the right `components`"
            )


@frozen(kw_only=True)
class PublishedModel:
    """The numbers of one published pipeline, so that a run can be planned before it is downloaded.

    Attributes:
        transformers: by module name, the arguments of the transformer class that differ from its
            defaults.
        latents: what its VAE makes of pixels.
        call_options: those of ``ModelKind.call_options`` that differ from their defaults.
    """

    transformers: Mapping[str, Mapping[str, object]]
    latents: LatentInfo
    call_options: Mapping[str, object] = field(default=MappingProxyType({}))


@frozen(kw_only=True)
class ModelDescription:
    """How the transformers of one pipeline are built and called.

    Attributes:
        transformers: configurations by module name, in the order of ``ModelKind.modules``.
        call_options: a value for each of ``ModelKind.call_options``.
    """

    transformers: Mapping[str, Mapping[str, object]]
    call_options: Mapping[str, object]

    @property
    def main(self) -> Mapping[str, object]:
        """The configuration of the first transformer; experts are built alike."""
        return next(iter(self.transformers.values()))


def describe_model(
    kind: ModelKind, path: str, published: Mapping[str, PublishedModel]
) -> ModelDescription:
    """Read the configurations of a folder or a cached hub id, else take the published numbers.

    Raises:
        WeightsError: nothing describes how the model is built.
    """
    folder = locate(path)
    if folder is not None and ((folder / "model_index.json").is_file() or not kind.has_index):
        index = read_json(folder / "model_index.json") if kind.has_index else {}
        names = transformer_names(folder, kind.modules, has_index=kind.has_index)
        if kind.has_index and kind.modules[0] not in names:
            raise WeightsError(
                f"{folder / 'model_index.json'} names no {kind.modules[0]}, and every model of "
                "this family has one. Download the folder again"
            )
        if names and all((folder / name / "config.json").is_file() for name in names):
            options = {
                name: _call_option(folder, name, index.get(name), default)
                for name, default in kind.call_options.items()
            }
            configs = {name: read_config(folder / name / "config.json") for name in names}
            return ModelDescription(transformers=configs, call_options=options)
    if path in published:
        model = published[path]
        return ModelDescription(
            transformers=model.transformers,
            call_options={**kind.call_options, **model.call_options},
        )
    raise WeightsError(
        folder_problem(path)
        or (
            unknown_hub_id(path, published)
            if is_hub_id(path)
            else f"{path} has no {kind.modules[0]}/config.json"
        )
    )


def expert_problems(
    model: ModelDescription, role: RoleSpec, ranges: Mapping[str, tuple[float, float]]
) -> Iterator[str]:
    """Say which of ``role.experts`` the model does not have.

    Args:
        ranges: by module of the model, the t that its calls have; empty of a model of one.
    """
    if role.experts and len(model.transformers) == 1:
        yield (
            f"{list(role.experts)}: {role.path} has one transformer, called at every t, and no "
            "experts to choose from. Leave this out"
        )
        return
    if unknown := [name for name in role.experts if name not in model.transformers]:
        known = ", ".join(
            f"{name} for t from {low:g} to {high:g}" for name, (low, high) in ranges.items()
        )
        yield (
            f"{', '.join(unknown)}: no expert of {role.path}, which has "
            f"{known or ', '.join(model.transformers)}. Name one of these"
        )


def choose_experts(model: ModelDescription, role: RoleSpec) -> ModelDescription:
    """Leave of ``model`` the transformers that ``role`` has.

    Raises:
        WeightsError: the model does not have one of ``role.experts``.
    """
    for problem in expert_problems(model, role, {}):
        raise WeightsError(f"role {role.name!r}: experts: {problem}")
    chosen = {
        name: config
        for name, config in model.transformers.items()
        if not role.experts or name in role.experts
    }
    return evolve(model, transformers=chosen)


def as_flow_map(model: ModelDescription, spec: TargetTimeSpec) -> ModelDescription:
    """Describe ``model`` with a second time embedder in each of its transformers."""
    configs = {
        name: {**config, TARGET_GATE: spec.gate} for name, config in model.transformers.items()
    }
    return evolve(model, transformers=configs)


def _call_option(folder: Path, name: str, value: object, default: object) -> object:
    """``value``, or ``default`` for null; a number where there is no default.

    Raises:
        WeightsError: it has another type than the default, or is no number from 0 to 1000.
    """
    if value is None:
        return default
    kind = type(default) if isinstance(default, bool | str) else float
    if kind is float and type(value) in (int, float) and 0 <= cast(float, value) <= TRAIN_STEPS:
        return value
    if kind is not float and type(value) is kind:
        return value
    kinds = {bool: "true or false", str: "a text", float: f"a number from 0 to {TRAIN_STEPS:g}"}
    raise WeightsError(
        f"{folder / 'model_index.json'}: {name!a} is {value!a:.80} and must be {kinds[kind]}, as "
        "it describes how the model is called; download it again"
    )


def statistics_problems(vae: str, statistics: Mapping[str, object], channels: int) -> Iterator[str]:
    """Say what is wrong with what a VAE's latents are normalised by.

    Args:
        vae: what to call it.
        statistics: ``latents_mean`` and ``latents_std`` (one number a channel), ``scaling_factor``
            and ``shift_factor`` (numbers), as far as the VAE has them.
        channels: of its latents.
    """
    for key, value in statistics.items():
        by_channel = key.startswith("latents_")
        numbers: list[Any] = value if by_channel and isinstance(value, list) else [value]
        right = all(
            isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n)
            for n in numbers
        )
        if by_channel and (len(numbers) != channels or not isinstance(value, list)):
            yield (
                f"{key} of {vae} has {len(numbers)} number(s), and its latents have {channels} "
                "channels; there must be one for each, or they would be normalised wrongly. Mend "
                "it, or download the VAE again"
            )
        elif not right or (key in ("latents_std", "scaling_factor") and not min(numbers) > 0):
            rule = "finite" if key in ("latents_mean", "shift_factor") else "finite and above 0"
            yield (
                f"{key} of {vae} is {value}; it must be {rule}, as latents are normalised by it. "
                "Mend it, or download the VAE again"
            )


def unknown_hub_id(path: str, published: Mapping[str, PublishedModel]) -> str:
    """Say why nothing is known of a hub id that is neither in the local cache nor published."""
    if "gguf" in path.lower():
        return (
            f"{path} holds GGUF weights, quantised ones that nothing here can be trained from. Use "
            "the model's Diffusers-format repository"
        )
    diffusers_id = f"{path}-Diffusers"
    if diffusers_id in published:
        return f"{path} holds the model's original format; did you mean {diffusers_id}?"
    return (
        f"{path} is not in the local Hugging Face cache, and its architecture is not among those "
        f"that ship with this package ({', '.join(published)}), so nothing can be planned. "
        f"Download it first: hf download {path}{folder_hint(path)}"
    )


def differing_entries(theirs: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    """``"key a instead of b"`` for each entry that both configurations have, and differently.

    Entries whose names begin with ``_`` are about the file and not compared.
    """
    return [
        f"{key} {theirs[key]} instead of {ours[key]}"
        for key in sorted(theirs.keys() & ours.keys())
        if not key.startswith("_") and as_json(theirs[key]) != as_json(ours[key])
    ]


def as_json(value: object) -> object:
    """Turn a tuple into the list that JSON makes of it, so that both compare equal."""
    return list(value) if isinstance(value, tuple) else value
