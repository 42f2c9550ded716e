"""Exports read back by the readers that they are for, and compared with what they were made of."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from attrs import evolve
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils import logging as diffusers_logging
from distill_protocols import (
    DTYPES,
    Precision,
    TensorInfo,
    WeightsError,
    WeightSource,
)
from peft import get_peft_model_state_dict
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from distill_diffusers.architecture import is_kept_in_fp32, kept_in_fp32
from distill_diffusers.export.formats import (
    Comparisons,
    Export,
    LoraContents,
    LoraNames,
    StockPipeline,
    adapter_factors,
    single_files,
)
from distill_diffusers.folders import fetch, read_json
from distill_diffusers.kinds import class_name, load_class
from distill_diffusers.weights.derived import CastWeights
from distill_diffusers.weights.extraction import Extraction, extract_others
from distill_diffusers.weights.modules import build_from
from distill_diffusers.weights.sources import FileWeights, read_in_groups

LORA_TOLERANCE = 1e-4
"""Largest difference of outputs through adapters from outputs of merged weights, as a part of the
outputs' rms. ``W x + B A x`` and ``(W + B A) x`` round differently: about 1e-6 a layer in fp32."""
NEAREST_TOLERANCE = 0.05
"""Of ``_check_nearest``, for factors in 16 bits. In fp32 rounding alone is between them, of a
randomised SVD as well, which projects the difference on its directions."""


def describe_result(format_name: str, module: str, numbers: Mapping[str, float]) -> str:
    """Say in a line what was compared."""
    if format_name != "lora":
        return f"{module}: no key unmatched, {numbers['tensors']} tensors and the outputs equal"
    return (
        f"{module}: no key unmatched, adapters of {numbers['layers']} layers equal, outputs within "
        f"{numbers['largest_difference']:.1g} of their rms of the merged weights'"
    )


@contextlib.contextmanager
def without_messages() -> Iterator[None]:
    """Hide diffusers' bar of read weights, which would write over the training's own, and its
    warning that weights are cast: they are read as fp32 for that. And peft's that a bias has one
    dimension."""
    enabled, level = diffusers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LoRA tensor.s. have invalid shape", PeftWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(level)
        if enabled:
            diffusers_logging.enable_progress_bar()


# -- diffusers ------------------------------------------------------------------------------------


def verify_pipeline(pipeline: StockPipeline, export: Export, folder: Path) -> Comparisons:
    """Load by ``from_pretrained``: no key unmatched, every number and the outputs equal bit for
    bit, and the scheduler's timesteps those that were written."""
    transformer = load_class(pipeline.kind.transformer)
    numbers = {}
    for name, full in export.full_weights().items():
        dtype = _dtype(full, export)
        loaded, info = _from_pretrained(transformer, folder, name, torch_dtype=dtype)
        _refuse_unmatched(folder / name, info)
        numbers[name] = compare(pipeline, loaded, full, export.modules[name], dtype, folder / name)
    _check_components(pipeline, export, folder)
    return numbers


def _from_pretrained(
    module_class: Any, folder: Path, name: str, **options: Any
) -> tuple[Any, Mapping[str, Iterable[object]]]:
    return module_class.from_pretrained(
        folder, subfolder=name, use_safetensors=True, output_loading_info=True, **options
    )


def _check_components(pipeline: StockPipeline, export: Export, folder: Path) -> None:
    """Check the rest of the pipeline but for text encoders: these are copies, and large."""
    vae, info = _from_pretrained(load_class(pipeline.kind.vae), folder, "vae")
    _refuse_unmatched(folder / "vae", info)
    made, expected = (
        _scheduler_steps(pipeline, scheduler, export)
        for scheduler in (
            _read_scheduler(pipeline, export, folder, vae),
            export.schedule.scheduler(),
        )
    )
    if made != expected:
        raise WeightsError(
            f"{folder}/scheduler is a {made[0]} with timesteps {made[1]}, and the request needs a "
            f"{expected[0]} with {expected[1]}; it is the export of another sampler. Export again"
        )


def _read_scheduler(pipeline: StockPipeline, export: Export, folder: Path, vae: Any) -> Any:
    """Read it through the pipeline that the index names; where there is no index, by itself."""
    if not pipeline.kind.has_index:
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        return export.schedule.scheduler_class.from_config(config)
    classes = {class_name(name): name for name in pipeline.kind.pipelines}
    index = read_json(folder / "model_index.json")
    modules = [name for name, entry in index.items() if isinstance(entry, list)]
    # Some pipelines read the VAE's configuration when they are made.
    omitted: dict[str, Any] = {**dict.fromkeys(set(modules) - {"scheduler"}), "vae": vae}
    loaded = load_class(classes[cast(str, index["_class_name"])]).from_pretrained(
        folder, use_safetensors=True, **omitted
    )
    return loaded.scheduler


def _scheduler_steps(
    pipeline: StockPipeline, scheduler: Any, export: Export
) -> tuple[str, list[float], list[float]]:
    """Return the class, and timesteps and noise levels as the pipeline has them made.

    Noise levels too, as some schedulers round t to whole numbers.
    """
    sampler = export.request.sampler
    pipeline.grid_of(export.role, sampler).set_timesteps(scheduler, sampler.steps)
    return type(scheduler).__name__, scheduler.timesteps.tolist(), scheduler.sigmas.tolist()


# -- single files ---------------------------------------------------------------------------------


def verify_single_files(
    pipeline: StockPipeline,
    export: Export,
    folder: Path,
    to_original: Callable[[str], str],
    to_diffusers: Iterable[Callable[[Iterable[str]], Iterable[str]]],
) -> Comparisons:
    """Load by ``from_single_file``: every name is the original code's, none is left over, every
    number and the outputs equal bit for bit.

    Args:
        to_diffusers: readers' translations of all names of a file, each of which must give ours.
    """
    transformer = load_class(pipeline.kind.transformer)
    files = single_files(export)
    numbers = {}
    for name, full in export.full_weights().items():
        file, meta = folder / files[name], export.modules[name]
        stored = FileWeights(str(file), [file]).describe()
        check_names(file, stored, map(to_original, meta.state_dict()))
        for translate in to_diffusers:
            check_names(file, translate(stored), meta.state_dict())
        with tempfile.TemporaryDirectory() as config:
            _save_config(meta, config)
            # fp32: from_single_file would round what from_pretrained keeps wide.
            loaded = transformer.from_single_file(
                str(file), config=config, torch_dtype=torch.float32
            )
        numbers[name] = compare(pipeline, loaded, full, meta, torch.float32, file)
    return numbers


def _save_config(module: Any, folder: str) -> None:
    module.save_config(folder)


# -- LoRA -----------------------------------------------------------------------------------------


def verify_lora(pipeline: StockPipeline, export: Export, folder: Path) -> Comparisons:
    """Load by ``load_lora_weights`` on the base, from each file: every adapter number equal bit for
    bit (extracted ones: nearest to the role's difference to its base), the outputs those of the
    merged weights within ``LORA_TOLERANCE``."""
    role, request = export.role, export.request
    base = export.path_weights(export.modules)
    source = fetch(role.path, tuple(export.modules))
    numbers = {}
    for name, meta in export.modules.items():
        files = {folder / file: names for file, names in pipeline.lora_files(export, name).items()}
        first, *others = files
        if role.lora is None and not any(file.exists() for file in files):
            _check_untouched(first, export.weights[name], base[name])
            numbers[name] = {"layers": 0, "largest_difference": 0.0}
            continue
        if role.lora is not None:
            factors = adapter_factors(role.lora, export.weights[name], request.precision)
            layers, expected = list(factors), LoraContents(factors=factors)
        else:
            # What is no matrix is written as it is; factors are held against it below.
            expected = _others_of(export.weights[name], base[name], request.precision)
            layers = [k for k, part in meta.named_modules() if isinstance(part, nn.Linear)]
        contents = {file: _read_lora(file, layers, files[file], expected) for file in files}
        factors = contents[first].factors
        if role.lora is not None:
            _check_equal(first, factors, expected.factors)
        else:
            _check_nearest(first, factors, export.weights[name], base[name])
        probe = pipeline.probe(meta, torch.float32)
        outputs = pipeline.outputs_with_lora(source, name, first, contents[first], probe)
        for other in others:
            theirs = pipeline.outputs_with_lora(source, name, other, contents[first], probe)
            if not torch.equal(outputs, theirs):
                raise WeightsError(f"{first} and {other} give different outputs; export again")
        added = _Added(base[name], contents[first])
        merged = _outputs_of(pipeline, added, meta, torch.float32)
        difference = float((outputs - merged).abs().max() / merged.square().mean().sqrt())
        if not difference <= LORA_TOLERANCE:  # nan is not
            raise WeightsError(
                f"{first} through load_lora_weights differs from the weights merged by hand by "
                f"{difference:.3g} of the outputs' rms, more than {LORA_TOLERANCE:g}; this peft or "
                "diffusers scales or places adapters otherwise"
            )
        numbers[name] = {"layers": len(factors), "largest_difference": difference}
        if role.lora is None:
            full = CastWeights(export.weights[name], "fp32", frozenset())
            expected_outputs = _outputs_of(pipeline, full, meta, torch.float32)
            error = (merged - expected_outputs).square().mean() / expected_outputs.square().mean()
            numbers[name]["relative_difference_to_role"] = float(error.sqrt())
    return numbers


def _check_untouched(file: Path, full: WeightSource, base: WeightSource) -> None:
    """Check that a module without a file has the weights of its base."""
    for name in base.describe():
        new, old = (source.read([name])[name] for source in (full, base))
        if not torch.equal(new, old):
            raise WeightsError(f"{file} is missing, and {name} differs from the base's")


def _others_of(
    whole: WeightSource, base: WeightSource, precision: Precision | None
) -> LoraContents:
    others = Extraction()
    extract_others(whole, base, others, precision=precision)
    return LoraContents(factors={}, biases=others.biases, differences=others.differences)


def _read_lora(
    file: Path, layers: Iterable[str], names: LoraNames, expected: LoraContents
) -> LoraContents:
    """Read what a file holds: of ``layers`` those that have factors, and just the biases and
    differences that are expected, bit for bit."""
    source = FileWeights(str(file), [file])
    stored = source.describe()
    pairs = {layer: [names.factor(layer, side) for side in "AB"] for layer in layers}
    adapted = {layer: pair for layer, pair in pairs.items() if pair[0] in stored}
    others = evolve(expected, factors={}).named(names)
    if names.scale is not None:
        others |= {names.scale(layer): torch.ones(()) for layer in adapted}
    check_names(file, stored, [*others, *(name for pair in adapted.values() for name in pair)])
    tensors = source.read(stored)
    _refuse_different(file, [k for k, v in others.items() if not _has_same_bits(tensors[k], v)])
    factors = {layer: (tensors[a], tensors[b]) for layer, (a, b) in adapted.items()}
    biases = {} if names.bias is None else expected.biases
    return evolve(expected, factors=factors, biases=biases)


def _check_equal(
    file: Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    expected: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    check_names(file, pairs, expected)
    different = [
        layer
        for layer, pair in expected.items()
        if not all(_has_same_bits(x, y) for x, y in zip(pairs[layer], pair, strict=True))
    ]
    _refuse_different(file, different)


def _check_nearest(
    file: Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    full: WeightSource,
    base: WeightSource,
) -> None:
    """Check that each ``B A`` is nearest to the difference D of two weights.

    The best ``B A`` equals D in some directions and is zero in the others, so ``<D, B A> =
    |B A|^2``. Of the difference of other weights, or of another scale, it is not.
    """
    different = []
    for layer, (a, b) in pairs.items():
        key = f"{layer}.weight"
        difference = full.read([key])[key].float() - base.read([key])[key].float()
        product = b.float() @ a.float()
        size = float(product.square().sum())
        if not abs(float((difference * product).sum()) - size) <= NEAREST_TOLERANCE * size:
            different.append(layer)
    _refuse_different(file, different)


def outputs_with_stock_lora(
    pipeline: StockPipeline,
    source: Path,
    name: str,
    file: Path,
    contents: LoraContents,
    probe: Mapping[str, Tensor],
) -> Tensor:
    """Call the base after stock ``load_lora_weights`` of ``file``."""
    pipeline_class = load_class(pipeline.kind.pipelines[0])
    transformer: Any = load_class(pipeline.kind.transformer).from_pretrained(
        source, subfolder=name, torch_dtype=torch.float32, use_safetensors=True
    )
    if pipeline.pipeline_loads_lora:
        # Nothing but the transformer takes part: the others that the pipeline asks for are None.
        parameters = inspect.signature(pipeline_class.__init__).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
        parts: dict[str, Any] = dict.fromkeys(required)
        parts |= {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler()}
        base: Any = pipeline_class(**parts)
        base.load_lora_weights(file.parent, weight_name=file.name)
    else:
        transformer.load_lora_adapter(file.parent, weight_name=file.name, adapter_name="default_0")
    loaded = get_peft_model_state_dict(transformer, adapter_name="default_0")
    expected = {
        f"{layer}.lora_{side}.weight": tensor
        for layer, pair in contents.factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    if contents.biases:  # one for every layer then
        expected |= {
            f"{layer}.lora_B.bias": contents.biases.get(layer, torch.zeros(len(b)))
            for layer, (_, b) in contents.factors.items()
        }
    # For an image-to-video model diffusers adds adapters of zeros on the layers that read the
    # picture, where a file has none: they change nothing.
    loaded = {k: v for k, v in loaded.items() if k in expected or v.any()}
    check_names(file, loaded, expected)
    _refuse_different(
        file, [k for k, v in expected.items() if not _has_same_bits(loaded[k], v.float())]
    )
    return call_with_probe(transformer, probe)


class _Added(WeightSource):
    """A base, adapters and biases by plain arithmetic, without a line of ``MergedWeights`` or
    peft."""

    def __init__(self, base: WeightSource, contents: LoraContents) -> None:
        self._base, self._pairs, self._biases = base, contents.factors, contents.biases

    @property
    def where(self) -> str:
        return self._base.where

    def describe(self) -> Mapping[str, TensorInfo]:
        return self._base.describe()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = {name: tensor.float() for name, tensor in self._base.read(names).items()}
        for name in tensors:
            if name.endswith(".weight") and (pair := self._pairs.get(name.removesuffix(".weight"))):
                tensors[name] = tensors[name] + pair[1].float() @ pair[0].float()
            bias = self._biases.get(name.removesuffix(".bias"))
            if bias is not None and name.endswith(".bias"):
                tensors[name] = tensors[name] + bias.float()
        return tensors


# -- comparing ------------------------------------------------------------------------------------


def _dtype(source: WeightSource, export: Export) -> torch.dtype:
    """Choose the type to load as: the request's, or the only one that is stored, or fp32."""
    if export.request.precision is not None:
        return DTYPES[export.request.precision]
    kept = kept_in_fp32(export.kind)
    infos = source.describe().items()
    stored = {info.dtype for name, info in infos if not is_kept_in_fp32(name, kept)}
    return stored.pop() if len(stored) == 1 else torch.float32


def compare(
    pipeline: StockPipeline,
    loaded: nn.Module,
    source: WeightSource,
    meta: nn.Module,
    dtype: torch.dtype,
    where: Path,
) -> Mapping[str, float]:
    """Compare numbers and outputs of ``loaded`` with those of ``source``, bit for bit.

    Raises:
        WeightsError: names, numbers or outputs differ.
    """
    # On meta is what the reader never filled; of shards it believes the index, and reports nothing.
    state = {name: value for name, value in loaded.state_dict().items() if not value.is_meta}
    check_names(where, state, source.describe())
    different = [
        name
        for name, tensor in read_in_groups(source, source.describe())
        if not _has_same_bits(state[name], tensor.to(state[name].dtype))
    ]
    _refuse_different(where, different)
    count = len(state)
    for parameter in loaded.parameters():
        # Out of the mapped file, where a matrix product may round otherwise by where numbers lie.
        parameter.data = parameter.data.clone()
    outputs = call_with_probe(loaded, pipeline.probe(meta, dtype))
    del loaded, state  # one module at a time
    expected = _outputs_of(pipeline, source, meta, dtype)
    difference = float((outputs.float() - expected.float()).abs().max())
    if not _has_same_bits(outputs, expected):
        raise WeightsError(
            f"{where}: all {count} tensors are equal, but outputs differ by up to "
            f"{difference:.3g}; the reader builds another model of them. Is config.json the role's?"
        )
    return {"tensors": count, "largest_difference": difference}


def _outputs_of(
    pipeline: StockPipeline, source: WeightSource, meta: Any, dtype: torch.dtype
) -> Tensor:
    """Call a module that is put together from ``source``, through no reader of diffusers."""
    module = build_from(load_class(pipeline.kind.transformer), dict(meta.config), source.where)
    kept = kept_in_fp32(pipeline.kind)
    state = {
        name: tensor.to(torch.float32 if is_kept_in_fp32(name, kept) else dtype, copy=True)
        for name, tensor in read_in_groups(source, source.describe())
    }
    module.load_state_dict(state, strict=True, assign=True)
    return call_with_probe(module, pipeline.probe(meta, dtype))


@torch.no_grad()
def call_with_probe(module: nn.Module, probe: Mapping[str, Tensor]) -> Tensor:
    """Call a transformer on inputs by argument name, without gradient."""
    output = module.eval()(**probe, return_dict=False)[0]
    # Z-Image takes and gives a list of pictures.
    return torch.stack(output) if isinstance(output, list) else output


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    """Tell whether all bits agree, also those of not-a-numbers."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(*flat)


def _refuse_unmatched(where: Path, info: Mapping[str, Iterable[object]]) -> None:
    unmatched = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if unmatched:
        raise WeightsError(f"{where}: diffusers leaves keys unmatched: {unmatched}; export again")


def check_names(where: Path, names: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse a file whose names are not exactly those expected.

    Raises:
        WeightsError: with the first of them.
    """
    names, expected = set(names), set(expected)
    if names != expected:
        raise WeightsError(
            f"{where}: {_some(expected - names)} missing, {_some(names - expected)} unexpected; a "
            "key that its reader does not know is dropped without a warning. Export again"
        )


def _refuse_different(where: Path, names: Iterable[str]) -> None:
    different = set(names)
    if different:
        raise WeightsError(
            f"{where}: {len(different)} tensors are not those of the role: {_some(different)}; it "
            "is the export of other weights, or damaged. Export again"
        )


def _some(names: set[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(sorted(names)[:most]) or "nothing") + more
