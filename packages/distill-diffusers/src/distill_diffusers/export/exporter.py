"""One role where other tools can read it: a pipeline folder, a ComfyUI file or a LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from attrs import asdict
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.images.shapes import image_kind
from distill_adapters_wan.kind import WAN
from distill_adapters_wan.names.original import to_original
from distill_adapters_wan.published import PUBLISHED
from distill_protocols import (
    DTYPES,
    ExportRequest,
    LoraSpec,
    Precision,
    RoleSpec,
    SamplerSpec,
    TensorInfo,
    WeightsError,
    WeightSource,
)
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from distill_diffusers.architecture import inspect_model, kept_in_fp32
from distill_diffusers.descriptions import describe_model
from distill_diffusers.export.rules import export_problems
from distill_diffusers.export.staging import whole_or_nothing
from distill_diffusers.export.streaming import write_safetensors
from distill_diffusers.folders import (
    DIFFUSERS_STEM,
    component_problems,
    fetch,
    locate,
    read_json,
)
from distill_diffusers.roles.lora import adapted_layers, adapter_names, names_of
from distill_diffusers.sampling.scheduler import StockSchedule, stock_schedule
from distill_diffusers.weights.derived import CastWeights, MergedWeights, round_to
from distill_diffusers.weights.extraction import Extraction, extract
from distill_diffusers.weights.modules import build_from, check_keys
from distill_diffusers.weights.sources import folder_weights

SPEC_FILE = "sampler_spec.json"
"""Beside the weights in every format; also the mark by which an export may replace an older one."""
LORA_STEM = "pytorch_lora_weights"
"""The name that ``load_lora_weights(folder)`` looks for."""
COMFY_LORA = "{}-comfyui"
"""Of the same LoRA under the names that ComfyUI reads, beside it."""
COMPONENTS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")
"""The last two: of Wan 2.1 image-to-video alone."""
_TOLERABLE = 0.5
"""Units of t; one step of the 1000 that Wan was trained on is 1."""
_COMFY_NUMBERS = {"attention_head_dim": 128, "freq_dim": 256, "patch_size": [1, 2, 2], "eps": 1e-6}
"""What ComfyUI takes for granted, as nothing in a weight file says it."""


_CAUSAL = (
    "this role makes a clip chunk by chunk (`causal`), and stock pipelines let all frames see all: "
    "their clips are not those that it was trained for. Sample it with WanAdapter.sample or .stream"
)


class WanExporter:
    """``Exporter`` of the Wan family.

    Args:
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id that VAE, text encoder and tokenizer are copied from.
    """

    def __init__(self, config: WanPipelineConfig, *, source: str) -> None:
        self._config = config
        self._source = source

    def export(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> Mapping[str, Any]:
        """Write ``folder`` whole or not at all, holding a few tensors at a time.

        - ``diffusers``: ``WanPipeline.from_pretrained(folder)(prompt, **facts["call"])`` samples as
          ``request.sampler`` says; ``facts["notes"]`` tells where stock code cannot.
        - ``comfyui``: ``<name>.safetensors`` (a second expert: ``<name>-transformer_2``) under the
          original Wan names without a prefix, which ComfyUI, its WanVideoWrapper and diffusers'
          ``from_single_file`` all read. ``<name>`` is the folder's.
        - ``lora``: ``pytorch_lora_weights.safetensors`` for ``load_lora_weights(folder)``, and the
          same for ComfyUI. alpha / rank is multiplied into B, so that readers that look for alpha
          in different places (or nowhere) agree.

        An older export in ``folder`` is replaced; anything else there is left alone.

        Returns:
            what ``sampler_spec.json`` holds: sampler, timesteps, files, notes ...

        Raises:
            OutputError: ``folder`` holds something else, or cannot be written.
            WeightsError: keys are missing or unexpected, the request cannot be had
                (``export_problems``), or a component to copy is missing or damaged.
        """
        folder = Path(folder)
        modules = checked_modules(role, weights, request)
        schedule = stock_schedule(request.sampler)
        facts = self._facts(role, request, schedule)
        if request.format == "diffusers":
            source = fetch(self._source, COMPONENTS)
            for problem in component_problems(source):
                raise WeightsError(f"{role.name} cannot be exported: {problem}")
            with whole_or_nothing(folder, SPEC_FILE) as stage:
                _write_pipeline(stage, source, role, modules, weights, request, schedule)
                index = _model_index(role, source, stage, list(modules), self._config)
                _write_json(stage / "model_index.json", index)
                return _concluded(stage, facts)
        with whole_or_nothing(folder, SPEC_FILE) as stage:
            if request.format == "comfyui":
                _write_original(stage, folder.name, role, modules, weights, request, facts)
            else:
                _write_lora(stage, folder.name, role, modules, weights, request, facts)
            return _concluded(stage, facts)

    def verify(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> Mapping[str, Any]:
        """See ``verification``: every key matched, every number and the outputs compared.

        Raises:
            WeightsError: with the names of what is unmatched or differs.
        """
        from distill_diffusers.export.verification import verify

        return verify(role, weights, Path(folder), request)

    def _facts(
        self, role: RoleSpec, request: ExportRequest, schedule: StockSchedule
    ) -> dict[str, Any]:
        spec, causal = request.sampler, self._config.causal
        if causal is not None and role.name not in causal.roles:
            causal = None
        call = {
            "num_inference_steps": spec.steps,
            "guidance_scale": spec.guidance,
            "num_frames": self._config.num_frames,
            "height": self._config.height,
            "width": self._config.width,
            "max_sequence_length": self._config.max_sequence_length,
        }
        if spec.guidance_2 is not None:
            call["guidance_scale_2"] = spec.guidance_2
        return {
            "role": role.name,
            "path": role.path,
            "weights": request.weights,
            "format": request.format,
            "precision": request.precision,
            "sampler": asdict(spec),
            "timesteps": [1000 * sigma for sigma in spec.sigmas()],
            "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", **schedule.config},
            "causal": None if causal is None else asdict(causal),
            "stock_timesteps": list(schedule.timesteps),
            "timestep_deviation": schedule.deviation,
            "call": call,
            "notes": [*_notes(role, request, schedule), *([] if causal is None else [_CAUSAL])],
        }


def checked_modules(
    role: RoleSpec, weights: Mapping[str, WeightSource], request: ExportRequest
) -> dict[str, WanTransformer3DModel]:
    """The role's transformers on the meta device, after every name and shape has been compared.

    Raises:
        WeightsError: ``weights`` are not those of the role, or the request cannot be had.
    """
    problems = [f"{'.'.join(p.path)}: {p.message}" for p in export_problems(role, request)]
    if problems:
        raise WeightsError(f"role {role.name!r} cannot be exported so; {'; '.join(problems)}")
    configs = describe_model(WAN, role.path, PUBLISHED).transformers
    if set(configs) != set(weights):
        raise WeightsError(
            f"role {role.name!r} has weights of {', '.join(weights) or 'nothing'}, and "
            f"{role.path} is built of {', '.join(configs)}; an export needs just these. Name the "
            "path that the role was trained from"
        )
    modules = {}
    for name, config in configs.items():
        modules[name] = build_from(WanTransformer3DModel, config, f"{role.path}, {name}")
        state: Mapping[str, Tensor] = modules[name].state_dict()
        if role.lora is not None:
            state = _adapter_shapes(role.lora, dict(modules[name].config))
        check_keys(
            weights[name],
            state,
            "A missing key would be random in whatever reads the export. Name the path (and the "
            "lora) that the role was trained with",
        )
    return modules


def _adapter_shapes(lora: LoraSpec, config: Mapping[str, Any]) -> dict[str, Tensor]:
    shapes = {}
    for layer, (taken, given) in adapted_layers(inspect_model(WAN, config), lora).items():
        a, b = names_of(layer)
        shapes[a] = torch.empty(lora.rank, taken, device="meta")
        shapes[b] = torch.empty(given, lora.rank, device="meta")
    return shapes


def whole_weights(
    role: RoleSpec, weights: Mapping[str, WeightSource], request: ExportRequest
) -> dict[str, WeightSource]:
    """By module, as they are written in whole: a LoRA merged into its base, then rounded."""
    sources: dict[str, WeightSource] = dict(weights)
    if role.lora is not None:
        base = folder_weights(role.path, WAN.modules)
        sources = {k: MergedWeights(base[k], v, role.lora.scale) for k, v in sources.items()}
    if request.precision is not None:
        kept = kept_in_fp32(WAN)
        sources = {k: CastWeights(v, request.precision, kept) for k, v in sources.items()}
    return sources


# -- Diffusers ------------------------------------------------------------------------------------


def _write_pipeline(
    stage: Path,
    source: Path,
    role: RoleSpec,
    modules: Mapping[str, WanTransformer3DModel],
    weights: Mapping[str, WeightSource],
    request: ExportRequest,
    schedule: StockSchedule,
) -> None:
    for name, whole in whole_weights(role, weights, request).items():
        modules[name].save_config(stage / name)
        _write_shards(
            stage / name, whole, list(modules[name].state_dict()), request.max_shard_bytes
        )
    schedule.scheduler().save_pretrained(stage / "scheduler")
    for name in COMPONENTS:
        if (source / name).is_dir():
            _copy(source / name, stage / name)
    _name_tokenizer(stage / "tokenizer" / "tokenizer_config.json")


def _write_shards(folder: Path, source: WeightSource, names: list[str], most: int) -> None:
    """Under the names, and split as, ``save_pretrained`` does."""
    facts = source.describe()
    split = split_state_dict_into_shards_factory(
        {name: facts[name] for name in names},
        get_storage_size=lambda fact: fact.nbytes,
        filename_pattern=DIFFUSERS_STEM + "{suffix}.safetensors",
        max_shard_size=most,
    )
    for file, keys in split.filename_to_tensors.items():
        write_safetensors(folder / file, {key: facts[key] for key in keys}, _one_of(source))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{DIFFUSERS_STEM}.safetensors.index.json").write_text(text, encoding="utf-8")


def _model_index(
    role: RoleSpec, source: Path, stage: Path, modules: list[str], config: WanPipelineConfig
) -> dict[str, Any]:
    """The source's index with our scheduler and the role's transformers, and only what is there."""
    index = read_json(source / "model_index.json")
    own = locate(role.path)
    if own is not None and (own / "model_index.json").is_file():
        theirs = read_json(own / "model_index.json")
        # Which pipeline, which expert when, and how t is given: the transformers' affair, not the
        # components'.
        told = ("_class_name", "boundary_ratio", "expand_timesteps")
        index |= {k: theirs[k] for k in told if k in theirs}
    if len(modules) > 1 and config.boundary_ratio is not None:
        index["boundary_ratio"] = config.boundary_ratio
    kinds = {name: kind for name, kind in index.items() if isinstance(kind, list)}
    kinds["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    kinds |= {name: ["diffusers", "WanTransformer3DModel"] for name in modules}
    if kinds.get("tokenizer", [None, None])[1] == _NEW_TOKENIZER:
        kinds["tokenizer"] = ["transformers", _OLD_TOKENIZER]
    for name in kinds:
        if not (stage / name).is_dir():
            kinds[name] = [None, None]
    return {**index, **kinds, "_diffusers_version": diffusers.__version__}


_NEW_TOKENIZER, _OLD_TOKENIZER = "TokenizersBackend", "PreTrainedTokenizerFast"


def _name_tokenizer(file: Path) -> None:
    """transformers 5 writes a class that 4 does not have; 5 reads the old name as well."""
    if file.is_file():
        config = read_json(file)
        if config.get("tokenizer_class") == _NEW_TOKENIZER:
            _write_json(file, {**config, "tokenizer_class": _OLD_TOKENIZER})


def _copy(source: Path, target: Path) -> None:
    # Links are followed: a hub cache is all links, and an export must stand alone.
    shutil.copytree(source, target, symlinks=False)


# -- ComfyUI --------------------------------------------------------------------------------------


def original_files(folder: str, modules: Mapping[str, Any]) -> dict[str, str]:
    """Module name -> its file in a ComfyUI export that is called ``folder``."""
    return {
        name: f"{folder}{'' if name == 'transformer' else f'-{name}'}.safetensors"
        for name in modules
    }


def _write_original(
    stage: Path,
    folder: str,
    role: RoleSpec,
    modules: Mapping[str, WanTransformer3DModel],
    weights: Mapping[str, WeightSource],
    request: ExportRequest,
    facts: dict[str, Any],
) -> None:
    for module in modules.values():
        facts["notes"] += _comfy_notes(dict(module.config))
    files = original_files(folder, modules)
    for name, whole in whole_weights(role, weights, request).items():
        ours = {to_original(key): key for key in modules[name].state_dict()}
        given = whole.describe()
        write_safetensors(
            stage / files[name],
            {theirs: given[key] for theirs, key in ours.items()},
            _renamed(whole, ours),
            _spec_metadata(facts),
        )


def _comfy_notes(config: Mapping[str, Any]) -> Iterator[str]:
    for key, expected in _COMFY_NUMBERS.items():
        value = config[key]
        value = list(value) if isinstance(value, (list, tuple)) else value
        if value != expected:
            yield (
                f"this model's {key} is {value}; ComfyUI takes {expected} for granted and will "
                "call it wrongly (diffusers' from_single_file with a config does not)"
            )


# -- LoRA -----------------------------------------------------------------------------------------


def lora_files(folder: str, module: str) -> tuple[str, str]:
    """(for diffusers, for ComfyUI): a module's files in a LoRA export called ``folder``."""
    end = "" if module == "transformer" else f"-{module}"
    return (
        f"{LORA_STEM}{end}.safetensors",
        f"{COMFY_LORA.format(folder)}{end}.safetensors",
    )


def diffusers_lora_name(layer: str, side: str) -> str:
    """As ``WanPipeline.save_lora_weights`` names it; of a second expert as well."""
    return f"transformer.{layer}.lora_{side}.weight"


def comfy_lora_name(layer: str, side: str) -> str:
    """As ComfyUI, WanVideoWrapper and musubi-tuner's converter name it."""
    original = to_original(f"{layer}.weight").removesuffix(".weight")
    return f"diffusion_model.{original}.lora_{side}.weight"


def _write_lora(
    stage: Path,
    folder: str,
    role: RoleSpec,
    modules: Mapping[str, WanTransformer3DModel],
    weights: Mapping[str, WeightSource],
    request: ExportRequest,
    facts: dict[str, Any],
) -> None:
    facts["lora"] = {}
    for name in modules:
        if role.lora is not None:
            pairs = adapter_factors(role.lora, weights[name], request.precision)
            facts["lora"][name] = {"rank": role.lora.rank, "layers": len(pairs)}
        else:
            base = folder_weights(role.path, WAN.modules)[name]
            rank = request.lora_rank or 0  # checked: it is there
            found = extract(weights[name], base, rank, precision=request.precision, seed_name=name)
            pairs = found.factors
            facts["lora"][name] = {"rank": rank, **found.summary()}
            facts["notes"] += _extraction_notes(role, name, found)
        if not pairs:
            raise WeightsError(
                f"role {role.name!r}, {name}: no linear layer differs from {role.path}, so there "
                "is nothing to make a LoRA of. Was it trained, and from this path?"
            )
        for file, named in zip(
            lora_files(folder, name), (diffusers_lora_name, comfy_lora_name), strict=True
        ):
            tensors = {
                named(layer, side): tensor
                for layer, pair in pairs.items()
                for side, tensor in zip("AB", pair, strict=True)
            }
            described = {k: TensorInfo(tuple(t.shape), t.dtype) for k, t in tensors.items()}
            write_safetensors(stage / file, described, tensors.__getitem__, _spec_metadata(facts))


def adapter_factors(
    lora: LoraSpec, source: WeightSource, precision: Precision | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, (A, B) of a LoRA role as they are written: alpha / rank is in B."""
    pairs = {}
    for layer, names in adapter_names(source.describe()).items():
        found = source.read(names)
        a, b = (found[name] for name in names)
        if lora.scale != 1:
            b = b.float() * lora.scale
        if precision is not None:
            dtype = DTYPES[precision]
            a, b = (round_to(x, dtype, n) for x, n in zip((a, b), names, strict=True))
        pairs[layer] = (a, b.to(a.dtype))
    return pairs


def _extraction_notes(role: RoleSpec, module: str, found: Extraction) -> Iterator[str]:
    yield (
        f"{module}: the LoRA is an approximation of the difference to {role.path}, off by "
        f"{found.relative_error:.3g} of it (Frobenius norm over {len(found.factors)} layers; "
        "lora.<module>.by_layer has each)"
    )
    if found.not_held:
        worst = max(found.not_held, key=found.not_held.__getitem__)
        yield (
            f"{module}: {len(found.not_held)} tensors that changed are no linear layers (biases, "
            "norms, scale/shift tables, patch embedding), so no LoRA holds them and the base's stay"
            f": most of all {worst}, by {found.not_held[worst]:.3g} of its norm "
            "(lora.<module>.not_held has each)"
        )


# -- all formats ----------------------------------------------------------------------------------


def _notes(role: RoleSpec, request: ExportRequest, schedule: StockSchedule) -> Iterator[str]:
    spec = request.sampler
    if role.precision != "fp32":
        yield (
            f"the role computes in {role.precision} in training; stock code computes in whatever "
            f"type it loads the weights as, so clips agree but for {role.precision} rounding"
        )
    if request.format == "comfyui":
        yield (
            "ComfyUI has samplers of its own: `timesteps` (t = 1000 sigma) and `sampler` say what "
            "the role was made for"
        )
        return
    if schedule.deviation > _TOLERABLE:
        yield (
            f"stock timesteps differ from the sampler's by up to {schedule.deviation:.2f} of 1000: "
            "FlowMatchEulerDiscreteScheduler cannot make them; `timesteps` holds the exact ones"
        )
    yield from _guidance_notes(spec)
    yield from _image_notes(role, request)
    if request.format == "lora":
        yield (
            "a LoRA file holds no scheduler: give the base's pipeline "
            "FlowMatchEulerDiscreteScheduler.from_config(`scheduler`) to sample as `sampler` says"
        )


def _guidance_notes(spec: SamplerSpec) -> Iterator[str]:
    high, low = spec.guidances
    if high < 1:
        yield (
            f"WanPipeline treats guidance_scale {high:g} as 1 (it guides only above 1), "
            "so it cannot repeat this sampler"
        )
    if high <= 1 and low != high:
        yield (
            f"WanPipeline guides neither expert where guidance_scale is at most 1, so "
            f"guidance_scale_2 {low:g} has no effect in it, and it cannot repeat this sampler"
        )
    if high > 1:
        yield "pass the run's negative prompt; WanPipeline's own default is the empty one"


def _image_notes(role: RoleSpec, request: ExportRequest) -> Iterator[str]:
    model = describe_model(WAN, role.path, PUBLISHED)
    kind = image_kind(model.main, model.call_options["expand_timesteps"])
    if kind == "channels":
        yield "pass the first frame as `image`, of the clip's size"
    elif kind == "frame" and request.format == "diffusers":
        yield (
            "the folder is WanPipeline's (text); WanImageToVideoPipeline.from_pretrained(folder) "
            "takes a first frame as `image`"
        )


def _concluded(stage: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Facts with the weight files' sizes; written beside them."""
    files = sorted(stage.rglob("*.safetensors"))
    facts["files"] = {str(file.relative_to(stage)): file.stat().st_size for file in files}
    _write_json(stage / SPEC_FILE, facts)
    return facts


def _spec_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """Of a weight file that travels alone. ComfyUI reads a key ``config``: not to be used."""
    told = ("role", "weights", "sampler", "timesteps", "call")
    return {"sampler_spec": json.dumps({key: facts[key] for key in told})}


def _one_of(source: WeightSource) -> Any:
    return lambda name: source.read([name])[name]


def _renamed(source: WeightSource, ours: Mapping[str, str]) -> Any:
    return lambda theirs: source.read([ours[theirs]])[ours[theirs]]


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
