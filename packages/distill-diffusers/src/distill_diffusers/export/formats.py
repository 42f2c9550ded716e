"""What an export is while it is written or verified, and the files that several formats share."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from attrs import field, frozen
from distill_protocols import (
    DTYPES,
    ExportRequest,
    LoraSpec,
    Precision,
    RoleSpec,
    SamplerSpec,
    WeightSource,
)
from torch import Tensor, nn

from distill_diffusers.architecture import kept_in_fp32
from distill_diffusers.export.files import write_weights
from distill_diffusers.kinds import ModelKind
from distill_diffusers.lora import adapter_names
from distill_diffusers.sampling.scheduler import StepGrid, StockSchedule
from distill_diffusers.weights.derived import CastWeights, MergedWeights, round_to
from distill_diffusers.weights.sources import folder_weights

LORA_STEM = "pytorch_lora_weights"
"""The file name that ``load_lora_weights(folder)`` looks for."""


@frozen(kw_only=True)
class LoraNames:
    """How a LoRA file names what it holds.

    Attributes:
        factor: (layer, ``A`` or ``B``) -> the name of that factor.
        bias: layer -> the name of the difference of a linear layer's bias; None: the file's reader
            takes none.
        difference: name of any other parameter -> the name of its difference; None likewise.
        scale: layer -> the name of what its reader multiplies the product of the factors by, which
            is 1, as alpha / rank is in B; None: it looks for no such tensor.
    """

    factor: Callable[[str, str], str]
    bias: Callable[[str], str] | None = None
    difference: Callable[[str], str] | None = None
    scale: Callable[[str], str] | None = None


@frozen(kw_only=True)
class LoraContents:
    """What LoRA files of one module hold, whatever they name it.

    Attributes:
        factors: by layer, A and B.
        biases: by layer, the difference of its bias.
        differences: by name, those of parameters that are in no linear layer.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    biases: Mapping[str, Tensor] = field(factory=dict)
    differences: Mapping[str, Tensor] = field(factory=dict)

    def named(self, names: LoraNames) -> dict[str, Tensor]:
        """Give the tensors of a file; biases and differences only where it takes them."""
        tensors = {
            names.factor(layer, side): tensor
            for layer, pair in self.factors.items()
            for side, tensor in zip("AB", pair, strict=True)
        }
        if names.scale is not None:
            tensors |= {names.scale(layer): torch.ones(()) for layer in self.factors}
        if names.bias is not None:
            tensors |= {names.bias(layer): tensor for layer, tensor in self.biases.items()}
        if names.difference is not None:
            tensors |= {names.difference(name): t for name, t in self.differences.items()}
        return tensors


@frozen(kw_only=True, eq=False)
class Export:
    """One export that is being written or verified.

    Attributes:
        name: of the folder.
        kind: class of the transformers.
        modules: transformers, on the meta device: the role's, and ``others``.
        others: names of those that the role does not have, and that are its path's own.
        weights: of the role, by module: whole, or adapters alone.
        schedule: the stock scheduler for ``request.sampler``.
        record: what ``sampler_spec.json`` states whatever the format is.
    """

    name: str
    kind: ModelKind
    role: RoleSpec
    request: ExportRequest
    modules: Mapping[str, nn.Module]
    others: frozenset[str] = frozenset()
    weights: Mapping[str, WeightSource]
    schedule: StockSchedule
    record: Mapping[str, object]

    def full_weights(self) -> dict[str, WeightSource]:
        """Return full weights by module: a LoRA merged into its base, then rounded; ``others`` as
        they are in the role's path."""
        sources: dict[str, WeightSource] = dict(self.weights)
        if self.role.lora is not None:
            base, scale = self.path_weights(sources), self.role.lora.scale
            sources = {k: MergedWeights(base[k], v, scale) for k, v in sources.items()}
        if self.others:
            sources |= self.path_weights(self.others)
            sources = {name: sources[name] for name in self.modules}
        if self.request.precision is not None:
            kept = kept_in_fp32(self.kind)
            precision = self.request.precision
            sources = {k: CastWeights(v, precision, kept) for k, v in sources.items()}
        return sources

    def path_weights(self, modules: Collection[str]) -> dict[str, WeightSource]:
        """Return the weights of these modules in the role's path."""
        return folder_weights(self.role.path, tuple(modules), has_index=self.kind.has_index)

    @property
    def metadata(self) -> dict[str, str]:
        """Header entries of a weight file that may be copied without ``sampler_spec.json``.

        ComfyUI reads an entry ``config``, so there must be none of that name.
        """
        names = ("role", "weights", "sampler", "timesteps", "call")
        return {"sampler_spec": json.dumps({name: self.record[name] for name in names})}

    def suffix(self, module: str) -> str:
        """End of the file names of a module: empty for the first of its kind."""
        return "" if module == self.kind.modules[0] else f"-{module}"


@frozen(kw_only=True)
class Written:
    """What a format adds to the record of an export.

    Attributes:
        notes: lines that a person should read.
        entries: further entries of ``sampler_spec.json``.
    """

    notes: tuple[str, ...] = ()
    entries: Mapping[str, object] = field(factory=dict)


Comparisons: TypeAlias = Mapping[str, Mapping[str, float]]
"""By module, how many tensors or layers were compared, and the largest difference of outputs."""


@frozen(kw_only=True)
class ExportFormat:
    """How one format is written and read back.

    Attributes:
        write: fills an empty folder.
        verify: reads the folder with the reader that it is for; raises WeightsError where
            something differs, and returns numbers by module (see ``verification``).
    """

    write: Callable[[Export, Path], Written]
    verify: Callable[[Export, Path], Comparisons]


class StockPipeline(Protocol):
    """What verification must know of a family's pipeline; ``PipelineExporter`` has it."""

    @property
    def kind(self) -> ModelKind:
        """Classes of transformer, VAE and pipeline."""
        ...

    def grid_of(self, role: RoleSpec, sampler: SamplerSpec) -> StepGrid:
        """Return what the pipeline's scheduler starts from."""
        ...

    @property
    def pipeline_loads_lora(self) -> bool:
        """Whether the pipeline has ``load_lora_weights``."""
        ...

    def probe(self, module: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Draw seeded inputs of a few tokens for a transformer, by argument name."""
        ...

    def lora_files(self, export: Export, module: str) -> Mapping[str, LoraNames]:
        """Give the files of a module's adapters: file name -> how it names what it holds."""
        ...

    def outputs_with_lora(
        self, base: Path, module: str, file: Path, contents: LoraContents,
        probe: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """Call ``module`` of the folder ``base`` with the adapters of ``file``, as the reader that
        the file is for adds them.

        Args:
            contents: what the file holds.
            probe: inputs by argument name.
        """
        ...


def single_files(export: Export) -> dict[str, str]:
    """Return by module the file name of its single-file export: ``<folder>.safetensors``."""
    return {name: f"{export.name}{export.suffix(name)}.safetensors" for name in export.modules}


def write_single_files(export: Export, stage: Path, to_original: Callable[[str], str]) -> None:
    """Write each module's full weights to one file, under the names that ``to_original`` gives."""
    files = single_files(export)
    for name, full in export.full_weights().items():
        ours = {to_original(key): key for key in export.modules[name].state_dict()}
        infos = full.describe()

        def read(
            original: str, names: Mapping[str, str] = ours, source: WeightSource = full
        ) -> Tensor:
            return source.read([names[original]])[names[original]]

        write_weights(
            stage / files[name],
            {original: infos[key] for original, key in ours.items()},
            read,
            export.metadata,
        )


DIFFUSERS_LORA = LoraNames(
    factor=lambda layer, side: f"transformer.{layer}.lora_{side}.weight",
    bias=lambda layer: f"transformer.{layer}.lora_B.bias",
)
"""As ``save_lora_weights`` of the pipelines names them, of any module. Their reader refuses a file
with names that are no adapter's."""


def adapter_factors(
    lora: LoraSpec, source: WeightSource, precision: Precision | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by layer (A, B) of a LoRA role as they are written: alpha / rank is in B."""
    pairs = {}
    for layer, names in adapter_names(source.describe()).items():
        factors = source.read(names)
        a, b = (factors[name] for name in names)
        if lora.scale != 1:
            b = b.float() * lora.scale
        if precision is not None:
            dtype = DTYPES[precision]
            a, b = (round_to(x, dtype, n) for x, n in zip((a, b), names, strict=True))
        pairs[layer] = (a, b.to(a.dtype))
    return pairs
