"""The exporter that every family on diffusers inherits from.

``PipelineExporter`` writes a role as a pipeline folder (``diffusers``) and as low-rank adapters
(``lora``), tensor by tensor. A family defines how its pipeline is called (``config_arguments``) and
what a person should know (``notes``), and adds formats of its own (``formats``).
"""

from __future__ import annotations

import abc
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, cast

import diffusers
import torch
from attrs import asdict
from distill_protocols import (
    EXIT_EMBEDDING,
    ExportRecord,
    ExportRequest,
    LoraSpec,
    RoleSpec,
    SamplerSpec,
    TensorInfo,
    WeightsError,
    WeightSource,
)
from distill_protocols.exports import SPEC_FILE
from torch import Tensor, nn

from distill_diffusers.architecture import (
    Architecture,
    build_on_meta,
    inspect_model,
)
from distill_diffusers.export import verification
from distill_diffusers.export.files import (
    replace_export,
    write_json,
    write_module,
    write_weights,
)
from distill_diffusers.export.formats import (
    DIFFUSERS_LORA,
    LORA_STEM,
    Comparisons,
    Export,
    ExportFormat,
    LoraContents,
    LoraNames,
    Written,
    adapter_factors,
    write_single_files,
)
from distill_diffusers.export_rules import FORMATS
from distill_diffusers.family import ConfigT, DiffusersFamily
from distill_diffusers.folders import (
    component_problems,
    fetch,
    index_entry,
    locate,
    portable_name,
    read_json,
)
from distill_diffusers.kinds import class_name
from distill_diffusers.lora import adapted_layers, names_of
from distill_diffusers.sampling.scheduler import (
    SchedulerGrid,
    StepGrid,
    StockSchedule,
    stock_schedule,
)
from distill_diffusers.weights.extraction import Extraction, extract
from distill_diffusers.weights.modules import check_keys

if TYPE_CHECKING:
    from attrs import AttrsInstance

TOLERABLE_DEVIATION = 0.5
"""Units of t; one step of the 1000 that models are trained on is 1."""

ENCODER_FOLDERS = tuple(
    f"{name}{suffix}" for name in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3")
)
"""As pipelines of diffusers name them."""


class PipelineExporter(abc.ABC, Generic[ConfigT]):
    """``Exporter`` of a family on diffusers whose pipeline guides where ``guidance_scale`` is above
    1.

    Args:
        family: describes how the models of a path are built and which requests cannot be had.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id that the other components are copied from.
    """

    components: ClassVar[tuple[str, ...]] = ("vae", *ENCODER_FOLDERS)
    """Folders that are copied from ``source``, those of them that it has."""
    config_arguments: ClassVar[tuple[str, ...]] = ("height", "width")
    """Keys of ``config`` that the pipeline takes under the same names."""
    grid: StepGrid = SchedulerGrid()
    """What the pipeline's scheduler starts from."""
    pipeline_loads_lora: bool = True
    """Whether the pipeline has ``load_lora_weights``; if not, its transformer's
    ``load_lora_adapter`` reads the file."""

    def __init__(self, family: DiffusersFamily[ConfigT], config: ConfigT, *, source: str) -> None:
        self.family = family
        self.kind = family.kind
        self.config = config
        self.source = source

    # -- what a family defines ------------------------------------------------------------------

    def call_arguments(self, role: RoleSpec, request: ExportRequest) -> Mapping[str, object]:
        """Return what the stock pipeline is called with, beside the prompt, to sample alike.

        By default steps, guidance and ``config_arguments``.
        """
        config = asdict(cast("AttrsInstance", self.config))
        return {
            "num_inference_steps": request.sampler.steps,
            "guidance_scale": request.sampler.guidance,
            **{name: config[name] for name in self.config_arguments},
        }

    def grid_of(self, role: RoleSpec, sampler: SamplerSpec) -> StepGrid:
        """Return what the scheduler of the role's pipeline starts from; by default ``grid``."""
        return self.grid

    def schedule_of(self, role: RoleSpec, sampler: SamplerSpec) -> StockSchedule:
        """Return the scheduler that repeats ``sampler`` in the role's pipeline; by default the
        nearest of ``FlowMatchEulerDiscreteScheduler`` or ``UniPCMultistepScheduler``."""
        return stock_schedule(sampler, self.grid_of(role, sampler))

    def transformer_configs(self, role: RoleSpec) -> Mapping[str, Mapping[str, object]]:
        """Return the configurations of the role's transformers that are written, by name, of
        ``kind``; by default those that it has."""
        return self.family.describe_role(role).transformers

    @abc.abstractmethod
    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Draw seeded inputs of a few tokens for a transformer, by argument name.

        Verification calls the exported and the expected transformer with them.
        """

    def formats(self) -> Mapping[str, ExportFormat]:
        """Return the formats by name; a family adds its own to these two."""
        return {
            "diffusers": ExportFormat(
                write=self._write_pipeline,
                verify=lambda export, folder: verification.verify_pipeline(self, export, folder),
            ),
            "lora": ExportFormat(
                write=self._write_lora,
                verify=lambda export, folder: verification.verify_lora(self, export, folder),
            ),
        }

    def file_of_own_names(self) -> ExportFormat:
        """Return the format of one file a transformer under diffusers' names, for readers that
        know the model by them."""

        def write(export: Export, stage: Path) -> Written:
            write_single_files(export, stage, str)
            return Written()

        def verify(export: Export, folder: Path) -> Comparisons:
            return verification.verify_single_files(self, export, folder, str, to_diffusers=())

        return ExportFormat(write=write, verify=verify)

    def lora_files(self, export: Export, module: str) -> Mapping[str, LoraNames]:
        """Return the files of a module's adapters: file name -> how it names what it holds.

        The first must be the one that ``load_lora_weights`` of the pipeline reads.
        """
        return {f"{LORA_STEM}{export.suffix(module)}.safetensors": DIFFUSERS_LORA}

    def outputs_with_lora(
        self, base: Path, module: str, file: Path, contents: LoraContents,
        probe: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """Call ``module`` of ``base`` with the adapters of ``file``; by default through the stock
        pipeline's ``load_lora_weights``."""
        return verification.outputs_with_stock_lora(self, base, module, file, contents, probe)

    def record_entries(self, role: RoleSpec) -> Mapping[str, object]:
        """Return the family's own entries of ``sampler_spec.json``."""
        return {}

    def index_entries(
        self, own_index: Mapping[str, object], modules: Collection[str]
    ) -> Mapping[str, object]:
        """Return entries of ``model_index.json`` that depend on the transformers.

        By default the pipeline's class alone; the other components come from ``source``, which may
        be the folder of another pipeline.

        Args:
            own_index: that of the role's path; empty where it has none.
            modules: names of the role's transformers.
        """
        return {key: own_index[key] for key in ("_class_name",) if key in own_index}

    def adapt_components(self, folder: Path, request: ExportRequest) -> None:
        """Change components of an export in the making, copies of the source's; by default none.

        Args:
            folder: of the pipeline; all but ``model_index.json`` is there.
        """

    def notes(
        self, role: RoleSpec, request: ExportRequest, schedule: StockSchedule
    ) -> Iterator[str]:
        """Yield what a person should know of any export of a role."""
        if role.precision != "fp32":
            yield (
                f"the role computes in {role.precision} in training; stock code computes in "
                f"whatever type it loads the weights as, so clips agree but for {role.precision} "
                "rounding"
            )
        yield from self.sampler_notes(role, request, schedule)

    def sampler_notes(
        self, role: RoleSpec, request: ExportRequest, schedule: StockSchedule
    ) -> Iterator[str]:
        """Yield where the stock pipeline cannot sample as the request asks."""
        if schedule.deviation > TOLERABLE_DEVIATION:
            yield (
                f"stock timesteps differ from the sampler's by up to {schedule.deviation:.2f} of "
                f"1000: {schedule.class_name} cannot make them; `timesteps` holds the exact ones"
            )
        yield from self.pipeline_notes(role, request)
        if request.format == "lora":
            yield (
                "a LoRA file holds no scheduler: give the base's pipeline "
                f"{schedule.class_name}.from_config(...) of `scheduler` in {SPEC_FILE}, which also "
                "has the arguments of the call"
            )

    def warnings(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Yield what of the notes one should know before training: that stock pipelines will take
        other steps than the student was trained for."""
        if request.format not in FORMATS:
            return
        schedule = self.schedule_of(role, request.sampler)
        if schedule.deviation > TOLERABLE_DEVIATION:
            own = ", ".join(f"{1000 * sigma:.6g}" for sigma in request.sampler.sigmas())
            stock = ", ".join(f"{t:.6g}" for t in schedule.timesteps)
            yield (
                f"stock pipelines will take t = {stock} for the sampler's {own}, off by up to "
                f"{schedule.deviation:.1f}: their scheduler begins at 1000 and has two numbers to "
                "meet the others. Train at times that it can walk, such as those of a shift, or "
                "sample the export by its `timesteps`"
            )

    def pipeline_notes(self, role: RoleSpec, request: ExportRequest) -> Iterator[str]:
        """Yield what a person should know of the family's pipeline; by default of its guidance."""
        pipeline, w = class_name(self.kind.pipelines[0]), request.sampler.guidance
        if w < 1:
            yield (
                f"{pipeline} treats guidance_scale {w:g} as 1 (it guides only above 1), so it "
                "cannot repeat this sampler"
            )
        if w > 1:
            yield f"pass the run's negative prompt; {pipeline}'s own default is the empty one"

    # -- Exporter -----------------------------------------------------------------------------

    def export(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> ExportRecord:
        """Write ``folder`` whole or not at all, with a few tensors in memory at a time.

        - ``diffusers``: ``Pipeline.from_pretrained(folder)(prompt, **record["call"])`` samples as
          ``request.sampler`` states; ``record["notes"]`` states where stock code cannot.
        - ``lora``: ``pytorch_lora_weights.safetensors`` for ``load_lora_weights(folder)``.
          alpha / rank is multiplied into B, so that readers that look for alpha in different
          places (or nowhere) agree.

        An older export in ``folder`` is replaced; anything else there is left alone.

        Returns:
            what ``sampler_spec.json`` states: sampler, timesteps, files, notes ...

        Raises:
            OutputError: ``folder`` holds something else, or cannot be written.
            WeightsError: keys are missing or unexpected, the request cannot be had
                (``family.export_problems``), or a component to copy is missing or damaged.
        """
        folder = Path(folder)
        export = self.prepare(role, weights, folder.name, request)
        if request.format == "diffusers":
            for problem in component_problems(fetch(self.source, self.components)):
                raise WeightsError(f"{role.name} cannot be exported: {problem}")
        with replace_export(folder) as stage:
            written = self.formats()[request.format].write(export, stage)
            files = sorted(stage.rglob("*.safetensors"))
            record = {
                **export.record,
                "notes": [*cast(ExportRecord, export.record)["notes"], *written.notes],
                **written.entries,
                "files": {str(file.relative_to(stage)): file.stat().st_size for file in files},
            }
            write_json(stage / SPEC_FILE, record)
        return cast(ExportRecord, record)

    def verify(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> ExportRecord:
        """Read ``folder`` and compare every name, every number and the outputs.

        Returns:
            by module, how many tensors were compared and the largest difference of outputs; in
            ``notes`` the same as lines to read.

        Raises:
            WeightsError: with the names of what is unmatched or differs.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise WeightsError(f"{folder} is no folder, so there is no export to verify")
        export = self.prepare(role, weights, folder.name, request)
        # diffusers' loaders draw from the global generator (peft's first A); nothing may stay.
        with torch.random.fork_rng(devices=[]), verification.without_messages():
            modules = self.formats()[request.format].verify(export, folder)
        notes = [
            verification.describe_result(request.format, name, numbers)
            for name, numbers in modules.items()
        ]
        return cast(ExportRecord, {"format": request.format, "notes": notes, **modules})

    def prepare(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        name: str,
        request: ExportRequest,
    ) -> Export:
        """Compare every name and shape of ``weights`` with the role's transformers.

        Raises:
            WeightsError: ``weights`` are not those of the role, or the request cannot be had.
        """
        found = self.family.export_problems(role, request)
        if problems := [f"{'.'.join(p.path)}: {p.message}" for p in found]:
            raise WeightsError(f"role {role.name!r} cannot be exported so; {'; '.join(problems)}")
        schedule = self.schedule_of(role, request.sampler)
        # No reader has an embedding of exit steps: a critic is exported as it is called without.
        weights = {name: own for name, own in weights.items() if name != EXIT_EMBEDDING}
        modules = self._checked_modules(role, weights)
        others: dict[str, nn.Module] = {}
        if request.format == "diffusers":
            model = self.family.describe(role.path).transformers
            others = {k: build_on_meta(self.kind, c) for k, c in model.items() if k not in modules}
        return Export(
            name=name,
            kind=self.kind,
            role=role,
            request=request,
            modules={k: (modules | others)[k] for k in self.kind.modules if k in modules | others},
            others=frozenset(others),
            weights=weights,
            schedule=schedule,
            record=self._record(role, request, schedule),
        )

    def _checked_modules(
        self, role: RoleSpec, weights: Mapping[str, WeightSource]
    ) -> dict[str, nn.Module]:
        configs = self.transformer_configs(role)
        if set(configs) != set(weights):
            raise WeightsError(
                f"role {role.name!r} has weights of {', '.join(weights) or 'nothing'}, and "
                f"{role.path} is built of {', '.join(configs)}; an export needs just these. Name "
                "the path that the role was trained from"
            )
        modules: dict[str, nn.Module] = {}
        for name, config in configs.items():
            modules[name] = build_on_meta(self.kind, config)
            state: Mapping[str, Tensor] = modules[name].state_dict()
            if role.lora is not None:
                state = _adapter_shapes(role.lora, inspect_model(self.kind, config))
            check_keys(
                weights[name],
                state,
                "A missing key would be random in whatever reads the export. Name the path (and "
                "the lora) that the role was trained with",
            )
        return modules

    def _record(
        self, role: RoleSpec, request: ExportRequest, schedule: StockSchedule
    ) -> dict[str, object]:
        return {
            "role": role.name,
            "family": self.family.name,
            "path": portable_name(role.path),
            "weights": request.weights,
            "format": request.format,
            "precision": request.precision,
            "compute_precision": role.precision,
            "pipeline_config": _portable_config(self.config),
            "sampler": asdict(request.sampler),
            "timesteps": list(schedule.sampler_timesteps),
            "scheduler": {"_class_name": schedule.class_name, **schedule.config},
            **self.record_entries(role),
            "stock_timesteps": list(schedule.timesteps),
            "timestep_deviation": schedule.deviation,
            "call": dict(self.call_arguments(role, request)),
            "notes": list(self.notes(role, request, schedule)),
        }

    # -- diffusers ----------------------------------------------------------------------------

    def _write_pipeline(self, export: Export, stage: Path) -> Written:
        source = fetch(self.source, self.components)
        for name, full in export.full_weights().items():
            module: Any = export.modules[name]
            module.save_config(stage / name)
            names = list(module.state_dict())
            write_module(stage / name, full, names, export.request.max_shard_bytes)
        export.schedule.scheduler().save_pretrained(stage / "scheduler")
        for name in self.components:
            if (source / name).is_dir():
                # Links are followed: a hub cache is all links, and an export must stand alone.
                shutil.copytree(source / name, stage / name, symlinks=False)
        self.adapt_components(stage, export.request)
        for file in stage.glob("tokenizer*/tokenizer_config.json"):
            _name_tokenizer(file)
        if self.kind.has_index:
            index = self.model_index(export, source, stage)
            write_json(stage / "model_index.json", index)
        path = portable_name(export.role.path)
        return Written(
            notes=tuple(
                f"{name} is that of {path}, unchanged: role {export.role.name!r} has "
                f"{', '.join(export.weights)} alone"
                for name in export.modules
                if name in export.others
            )
        )

    def model_index(self, export: Export, source: Path, stage: Path) -> dict[str, object]:
        """Compose the source's index with our scheduler, the role's transformers, and only what
        is there."""
        modules = list(export.modules)
        index = read_json(source / "model_index.json")
        own = locate(export.role.path)
        own_index: Mapping[str, object] = {}
        if own is not None and (own / "model_index.json").is_file():
            own_index = read_json(own / "model_index.json")
        index |= self.index_entries(own_index, modules)
        classes: dict[str, list[Any]] = {
            name: list(index_entry(source, index, name))
            for name, entry in index.items()
            if isinstance(entry, list)
        }
        classes["scheduler"] = ["diffusers", export.schedule.class_name]
        classes |= {name: ["diffusers", class_name(self.kind.transformer)] for name in modules}
        for name, entry in classes.items():
            if entry[1] == _NEW_TOKENIZER:
                classes[name] = ["transformers", _OLD_TOKENIZER]
            if not (stage / name).is_dir():
                classes[name] = [None, None]
        return {**index, **classes, "_diffusers_version": diffusers.__version__}

    # -- LoRA ---------------------------------------------------------------------------------

    def _write_lora(self, export: Export, stage: Path) -> Written:
        role, request = export.role, export.request
        notes: list[str] = []
        summaries: dict[str, object] = {}
        for name in export.modules:
            if role.lora is not None:
                pairs = adapter_factors(role.lora, export.weights[name], request.precision)
                contents = LoraContents(factors=pairs)
                summaries[name] = {"rank": role.lora.rank, "layers": len(pairs)}
            else:
                base = export.path_weights([name])[name]
                rank = request.lora_rank or 0  # problems() refuses a request without it
                extraction = extract(
                    export.weights[name], base, rank, precision=request.precision, seed_name=name
                )
                contents = LoraContents(
                    factors=extraction.factors,
                    biases=extraction.biases,
                    differences=extraction.differences,
                )
                summaries[name] = {"rank": rank, **extraction.summary()}
                notes += _extraction_notes(role, name, extraction, self.lora_files(export, name))
            if not contents.factors and not contents.differences:
                notes.append(
                    f"{name}: no weight differs from {portable_name(role.path)}, so it is left "
                    "out, and the base's stays"
                )
                continue
            for file, names in self.lora_files(export, name).items():
                tensors = contents.named(names)
                infos = {k: TensorInfo(tuple(t.shape), t.dtype) for k, t in tensors.items()}
                write_weights(stage / file, infos, tensors.__getitem__, export.metadata)
        if not any(stage.glob("*.safetensors")):
            raise WeightsError(
                f"role {role.name!r}: no linear layer differs from {role.path}, so there is "
                "nothing to make a LoRA of. Was it trained, and from this path?"
            )
        return Written(notes=tuple(notes), entries={"lora": summaries})


def _portable_config(config: object) -> dict[str, object]:
    """``pipeline_config`` without paths, which mean nothing on another machine: the export has all
    that they named."""
    return asdict(cast("AttrsInstance", config), filter=lambda key, _: "path" not in key.metadata)


def _adapter_shapes(lora: LoraSpec, architecture: Architecture) -> dict[str, Tensor]:
    shapes = {}
    for layer, (inputs, outputs) in adapted_layers(architecture, lora).items():
        a, b = names_of(layer)
        shapes[a] = torch.empty(lora.rank, inputs, device="meta")
        shapes[b] = torch.empty(outputs, lora.rank, device="meta")
    return shapes


def _extraction_notes(
    role: RoleSpec, module: str, extraction: Extraction, files: Mapping[str, LoraNames]
) -> Iterator[str]:
    takers = [file for file, names in files.items() if names.difference]
    yield (
        f"{module}: the LoRA is an approximation of the difference to {portable_name(role.path)}, "
        f"off by {extraction.relative_error:.3g} of it (Frobenius norm over "
        f"{len(extraction.factors)} layers; lora.<module>.by_layer has each)"
    )
    if extraction.biases and not any(names.bias for names in files.values()):
        yield (
            f"{module}: the biases of {len(extraction.biases)} layers changed, and no file of this "
            "format holds them: there the base's stay"
        )
    if extraction.differences:
        changes = {name: extraction.other_changes[name] for name in extraction.differences}
        worst = max(changes, key=changes.__getitem__)
        held = (
            f"{' and '.join(takers)} has them as .diff and .diff_b, which ComfyUI adds; diffusers "
            "drops them"
            if takers
            else "no file of this format holds them"
        )
        yield (
            f"{module}: {len(changes)} tensors that changed are in no linear layer (norms, "
            f"scale/shift tables, patch embedding). {held}: there the base's stay, most of all "
            f"{worst}, by {changes[worst]:.3g} of its norm (lora.<module>.differences has each)"
        )


_NEW_TOKENIZER, _OLD_TOKENIZER = "TokenizersBackend", "PreTrainedTokenizerFast"


def _name_tokenizer(file: Path) -> None:
    """Rename the class that transformers 5 writes and 4 does not have; 5 reads the old name too."""
    config = read_json(file)
    if config.get("tokenizer_class") == _NEW_TOKENIZER:
        write_json(file, {**config, "tokenizer_class": _OLD_TOKENIZER})
