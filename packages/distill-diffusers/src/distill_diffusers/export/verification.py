"""Exports read back by the readers that they are for, and compared with what they were made of."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils import logging as diffusers_logging
from distill_adapters_wan.kind import WAN
from distill_adapters_wan.names.original import to_diffusers, to_original
from distill_adapters_wan.shape import TEXT_TOKENS
from distill_protocols import (
    DTYPES,
    ExportRequest,
    RoleSpec,
    TensorInfo,
    WeightsError,
    WeightSource,
)
from peft import get_peft_model_state_dict
from torch import Tensor

from distill_diffusers.architecture import inspect_model, is_kept_in_fp32, kept_in_fp32
from distill_diffusers.export.exporter import (
    adapter_factors,
    checked_modules,
    diffusers_lora_name,
    lora_files,
    original_files,
    whole_weights,
)
from distill_diffusers.folders import fetch, read_json
from distill_diffusers.sampling.scheduler import stock_schedule
from distill_diffusers.weights.derived import CastWeights
from distill_diffusers.weights.modules import build_from
from distill_diffusers.weights.sources import FileWeights, folder_weights, read_in_groups

LORA_TOLERANCE = 1e-4
"""Largest difference of outputs through adapters from outputs of merged weights, as a part of the
outputs' rms. ``W x + B A x`` and ``(W + B A) x`` round differently: about 1e-6 a layer in fp32."""
NEAREST_TOLERANCE = 0.05
"""Of ``_check_nearest``: room for factors in 16 bits. In fp32 rounding alone is between them, of a
randomised SVD as well, which projects the difference on its directions."""
_TEXT_TOKENS_ALONE, _IMAGE_TOKENS = 8, 257


def verify(
    role: RoleSpec,
    weights: Mapping[str, WeightSource],
    folder: Path,
    request: ExportRequest,
) -> dict[str, Any]:
    """Read ``folder`` and compare.

    One module is in memory at a time (of a LoRA, its base twice).

    - ``diffusers``: ``from_pretrained``; no unmatched key, every number and the outputs equal bit
      for bit, the scheduler's timesteps those that were written.
    - ``comfyui``: every key has its name in the original code, ``from_single_file`` leaves none
      over, every number and the outputs equal bit for bit.
    - ``lora``: ``load_lora_weights`` on the base, from both files; every adapter number equal bit
      for bit (extracted ones: nearest to the role's difference to its base), the outputs those of
      the merged weights within ``LORA_TOLERANCE``.

    Returns:
        by module, how many tensors were compared and the largest difference of outputs; in
        ``notes`` the same as lines to read.

    Raises:
        WeightsError: naming what is missing, unexpected or different.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder} is no folder, so there is no export to verify")
    modules = checked_modules(role, weights, request)
    check = {"diffusers": _pipeline, "comfyui": _single_file, "lora": _lora}[request.format]
    # diffusers' loaders draw from the global generator (peft's first A); nothing of it may stay.
    with torch.random.fork_rng(devices=[]), _quietly():
        found = check(role, weights, folder, request, modules)
    notes = [_said(request.format, name, facts) for name, facts in found.items()]
    return {"format": request.format, "notes": notes, **found}


def _said(form: str, name: str, facts: Mapping[str, Any]) -> str:
    if form != "lora":
        return f"{name}: no key unmatched, {facts['tensors']} tensors and the outputs equal"
    return (
        f"{name}: no key unmatched, adapters of {facts['layers']} layers equal, outputs within "
        f"{facts['largest_difference']:.1g} of their rms of the merged weights'"
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without diffusers' bar of read weights, which would write over the training's own, and its
    warning that weights are cast, which is what these are read as fp32 for."""
    shown, level = diffusers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
        if shown:
            diffusers_logging.enable_progress_bar()


# -- Diffusers ------------------------------------------------------------------------------------


def _pipeline(
    role: RoleSpec,
    weights: Mapping[str, WeightSource],
    folder: Path,
    request: ExportRequest,
    modules: Mapping[str, WanTransformer3DModel],
) -> dict[str, Any]:
    compared = {}
    for name, whole in whole_weights(role, weights, request).items():
        dtype = _dtype(whole, request)
        loaded, info = _loaded(WanTransformer3DModel, folder, name, torch_dtype=dtype)
        _refuse_unmatched(folder / name, info)
        compared[name] = _compared(loaded, whole, modules[name], dtype, folder / name)
    _check_components(folder, request)
    return compared


def _loaded(module_class: Any, folder: Path, name: str, **given: Any) -> tuple[Any, Any]:
    return module_class.from_pretrained(
        folder, subfolder=name, use_safetensors=True, output_loading_info=True, **given
    )


def _check_components(folder: Path, request: ExportRequest) -> None:
    """The rest of the pipeline, but for the text encoder: that is a copy, and large."""
    _, info = _loaded(AutoencoderKLWan, folder, "vae")
    _refuse_unmatched(folder / "vae", info)
    known = {kind.__name__: kind for kind in (WanPipeline, WanImageToVideoPipeline)}
    index = read_json(folder / "model_index.json")
    modules = [name for name, kind in index.items() if isinstance(kind, list)]
    parts: dict[str, Any] = dict.fromkeys(set(modules) - {"scheduler"})
    pipeline: Any = known[index["_class_name"]].from_pretrained(
        folder, use_safetensors=True, **parts
    )
    pipeline.scheduler.set_timesteps(request.sampler.steps)
    made, meant = pipeline.scheduler.timesteps.tolist(), stock_schedule(request.sampler).timesteps
    if made != list(meant):
        raise WeightsError(
            f"{folder}/scheduler makes timesteps {made}, and the request's are {list(meant)}; it "
            "is the export of another sampler. Export again"
        )


# -- ComfyUI --------------------------------------------------------------------------------------


def _single_file(
    role: RoleSpec,
    weights: Mapping[str, WeightSource],
    folder: Path,
    request: ExportRequest,
    modules: Mapping[str, WanTransformer3DModel],
) -> dict[str, Any]:
    files = original_files(folder.name, modules)
    compared = {}
    for name, whole in whole_weights(role, weights, request).items():
        file, meta = folder / files[name], modules[name]
        found = FileWeights(str(file), [file]).describe()
        _check_names(file, found, map(to_original, meta.state_dict()))
        theirs = convert_wan_transformer_to_diffusers(dict.fromkeys(found))
        _check_names(file, theirs, meta.state_dict())
        _check_names(file, map(to_diffusers, found), meta.state_dict())
        with tempfile.TemporaryDirectory() as config:
            meta.save_config(config)
            # fp32: from_single_file would round what from_pretrained keeps wide.
            loaded = WanTransformer3DModel.from_single_file(
                str(file), config=config, torch_dtype=torch.float32
            )
        compared[name] = _compared(loaded, whole, meta, torch.float32, file)
    return compared


# -- LoRA -----------------------------------------------------------------------------------------


def _lora(
    role: RoleSpec,
    weights: Mapping[str, WeightSource],
    folder: Path,
    request: ExportRequest,
    modules: Mapping[str, WanTransformer3DModel],
) -> dict[str, Any]:
    base = folder_weights(role.path, WAN.modules)
    source = fetch(role.path, tuple(modules))
    compared = {}
    for name, meta in modules.items():
        ours, comfy = (folder / file for file in lora_files(folder.name, name))
        pairs = _pairs_in(ours, meta)
        if role.lora is not None:
            _check_equal(ours, pairs, adapter_factors(role.lora, weights[name], request.precision))
        else:
            _check_nearest(ours, pairs, weights[name], base[name])
        first, second = (
            _with_lora(source, name, file, pairs, _probe(meta, torch.float32))
            for file in (ours, comfy)
        )
        if not torch.equal(first, second):
            raise WeightsError(f"{ours} and {comfy} give different outputs; export again")
        merged = _outputs_of(_Added(base[name], pairs), meta, torch.float32)
        difference = float((first - merged).abs().max() / merged.square().mean().sqrt())
        if not difference <= LORA_TOLERANCE:  # nan is not
            raise WeightsError(
                f"{ours} through load_lora_weights differs from the weights merged by hand by "
                f"{difference:.3g} of the outputs' rms, more than {LORA_TOLERANCE:g}; this peft or "
                "diffusers scales or places adapters otherwise"
            )
        compared[name] = {"layers": len(pairs), "largest_difference": difference}
        if role.lora is None:
            whole = _outputs_of(
                CastWeights(weights[name], "fp32", kept_in_fp32(WAN)), meta, torch.float32
            )
            off = (merged - whole).square().mean() / whole.square().mean()
            compared[name]["relative_difference_to_role"] = float(off.sqrt())
    return compared


def _pairs_in(file: Path, meta: WanTransformer3DModel) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, the (A, B) of ``file``, every key of which must be one."""
    source = FileWeights(str(file), [file])
    layers = inspect_model(WAN, dict(meta.config)).linear_layers
    names = {layer: [diffusers_lora_name(layer, side) for side in "AB"] for layer in layers}
    there = {layer: pair for layer, pair in names.items() if pair[0] in source.describe()}
    _check_names(file, source.describe(), [name for pair in there.values() for name in pair])
    found = source.read(source.describe())
    return {layer: (found[a], found[b]) for layer, (a, b) in there.items()}


def _check_equal(
    file: Path,
    found: Mapping[str, tuple[Tensor, Tensor]],
    meant: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    _check_names(file, found, meant)
    odd = [
        layer
        for layer, pair in meant.items()
        if not all(_same_bits(x, y) for x, y in zip(found[layer], pair, strict=True))
    ]
    _refuse_different(file, odd)


def _check_nearest(
    file: Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    whole: WeightSource,
    base: WeightSource,
) -> None:
    """The best ``B A`` is the difference D itself in some directions and zero in the others, so
    ``<D, B A> = |B A|^2``: of the difference of other weights, or of another scale, it is not."""
    odd = []
    for layer, (a, b) in pairs.items():
        key = f"{layer}.weight"
        difference = whole.read([key])[key].float() - base.read([key])[key].float()
        product = b.float() @ a.float()
        size = float(product.square().sum())
        if not abs(float((difference * product).sum()) - size) <= NEAREST_TOLERANCE * size:
            odd.append(layer)
    _refuse_different(file, odd)


def _with_lora(
    source: Path,
    name: str,
    file: Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    probe: Mapping[str, Tensor],
) -> Tensor:
    """Outputs of the base after stock ``load_lora_weights`` of ``file``."""
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    transformer = WanTransformer3DModel.from_pretrained(
        source, subfolder=name, torch_dtype=torch.float32, use_safetensors=True
    )
    pipeline: Any = WanPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    held = get_peft_model_state_dict(transformer, adapter_name="default_0")
    meant = {
        f"{layer}.lora_{side}.weight": tensor
        for layer, pair in pairs.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    _check_names(file, held, meant)
    _refuse_different(file, [k for k, v in meant.items() if not _same_bits(held[k], v.float())])
    return _called(transformer, probe)


class _Added(WeightSource):
    """A base and adapters by plain arithmetic, without a line of ``MergedWeights`` or peft."""

    def __init__(self, base: WeightSource, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._base, self._pairs = base, pairs

    @property
    def where(self) -> str:
        return self._base.where

    def describe(self) -> Mapping[str, TensorInfo]:
        return self._base.describe()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {name: tensor.float() for name, tensor in self._base.read(names).items()}
        for name in found:
            if pair := self._pairs.get(name.removesuffix(".weight")):
                found[name] = found[name] + pair[1].float() @ pair[0].float()
        return found


# -- comparing ------------------------------------------------------------------------------------


def _dtype(source: WeightSource, request: ExportRequest) -> torch.dtype:
    """The type to load them as: the request's, or the narrowest that is there."""
    if request.precision is not None:
        return DTYPES[request.precision]
    kept = kept_in_fp32(WAN)
    kinds = {
        facts.dtype for name, facts in source.describe().items() if not is_kept_in_fp32(name, kept)
    }
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _compared(
    loaded: Any,
    source: WeightSource,
    meta: WanTransformer3DModel,
    dtype: torch.dtype,
    where: Path,
) -> dict[str, Any]:
    """Numbers and outputs of ``loaded`` against those of ``source``, bit for bit."""
    # On meta is what the reader never filled; of shards it believes the index, and says nothing.
    state = {name: value for name, value in loaded.state_dict().items() if not value.is_meta}
    _check_names(where, state, source.describe())
    odd = [
        name
        for name, tensor in read_in_groups(source, source.describe())
        if not _same_bits(state[name], tensor.to(state[name].dtype))
    ]
    _refuse_different(where, odd)
    count = len(state)
    for parameter in loaded.parameters():
        # Out of the mapped file: where a number lies must not count here (see streaming).
        parameter.data = parameter.data.clone()
    found = _called(loaded, _probe(meta, dtype))
    del loaded, state  # one module at a time
    meant = _outputs_of(source, meta, dtype)
    difference = float((found.float() - meant.float()).abs().max())
    if not _same_bits(found, meant):
        raise WeightsError(
            f"{where}: all {count} tensors are equal, but outputs differ by up to "
            f"{difference:.3g}; the reader builds another model of them. Is config.json the role's?"
        )
    return {"tensors": count, "largest_difference": difference}


def _outputs_of(source: WeightSource, meta: WanTransformer3DModel, dtype: torch.dtype) -> Tensor:
    """Of a module that is put together from ``source``, through no reader of diffusers."""
    module = build_from(WanTransformer3DModel, dict(meta.config), source.where)
    kept = kept_in_fp32(WAN)
    state = {
        name: tensor.to(torch.float32 if is_kept_in_fp32(name, kept) else dtype, copy=True)
        for name, tensor in read_in_groups(source, source.describe())
    }
    module.load_state_dict(state, strict=True, assign=True)
    return _called(module, _probe(meta, dtype))


@torch.no_grad()
def _called(module: Any, probe: Mapping[str, Tensor]) -> Tensor:
    return module.eval()(**probe, return_dict=False)[0]


def _probe(meta: WanTransformer3DModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Seeded inputs of four tokens."""
    facts: Any = meta.config
    draw = torch.Generator().manual_seed(0)
    frames, height, width = facts.patch_size
    size = (1, facts.in_channels, frames, 2 * height, 2 * width)
    tokens = _TEXT_TOKENS_ALONE if facts.image_dim is None else TEXT_TOKENS
    probe = {
        "hidden_states": torch.randn(size, generator=draw).to(dtype),
        "timestep": torch.tensor([640.0]),
        "encoder_hidden_states": torch.randn(1, tokens, facts.text_dim, generator=draw).to(dtype),
    }
    if facts.image_dim is not None:
        image = torch.randn(1, _IMAGE_TOKENS, facts.image_dim, generator=draw)
        probe["encoder_hidden_states_image"] = image.to(dtype)
    return probe


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether all bits agree (of not-a-numbers, too)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(*flat)


def _refuse_unmatched(where: Path, info: Any) -> None:
    unmatched = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if unmatched:
        raise WeightsError(f"{where}: diffusers leaves keys unmatched: {unmatched}; export again")


def _check_names(where: Path, found: Iterable[str], meant: Iterable[str]) -> None:
    found, meant = set(found), set(meant)
    if found != meant:
        raise WeightsError(
            f"{where}: {_some(meant - found)} missing, {_some(found - meant)} unexpected; a key "
            "that its reader does not know is dropped without a word. Export again"
        )


def _refuse_different(where: Path, names: Iterable[str]) -> None:
    odd = set(names)
    if odd:
        raise WeightsError(
            f"{where}: {len(odd)} tensors are not those of the role: {_some(odd)}; it is the "
            "export of other weights, or damaged. Export again"
        )


def _some(names: set[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(sorted(names)[:most]) or "nothing") + more
