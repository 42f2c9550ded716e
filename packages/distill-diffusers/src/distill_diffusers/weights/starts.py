"""Weights that a role may start from though they are in no pipeline folder.

- one safetensors file, or the shards of one folder, under our names or those of the model's
  original code; with the prefixes of ComfyUI, whose all-in-one files hold other parts too;
- a folder for each expert, as the original code has them;
- a LoRA: of diffusers, peft, ComfyUI, musubi-tuner or LongCat-Video's code; merged into the weights
  of the role's path, or, where the role is a LoRA of just this shape, as its adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen
from distill_protocols import (
    ForeignNames,
    LoraSpec,
    RoleSpec,
    TensorInfo,
    WeightsError,
    WeightSource,
)
from distill_protocols.exports import SPEC_FILE
from distill_runtime import parse_json
from torch import Tensor

from distill_diffusers.folders import is_hub_id, locate, read_json
from distill_diffusers.lora import names_of
from distill_diffusers.weights.sources import FileWeights, JoinedWeights, metadata_of

_DOT = "___lorahyphen___"
"""A dot in the names of LongCat-Video's LoRAs."""
PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "transformer.", "base_model.model.",
    f"lora{_DOT}",
)  # fmt: skip
_INDEX = ".safetensors.index.json"
_LORA_STEM = "pytorch_lora_weights"
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>A|B|down|up)(\.default)?\.weight")
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_MUSUBI = "lora_unet_"


@frozen(kw_only=True)
class Start:
    """Files to start from.

    Attributes:
        where: what was asked for, for messages.
        files: by module.
        is_lora: whether they hold adapters and differences.
        keeps_others: whether a module without files keeps the weights of the role's path, because
            an export found nothing in it that differs from them.
    """

    where: str
    files: Mapping[str, tuple[Path, ...]]
    is_lora: bool
    keeps_others: bool = False

    def source(self, module: str) -> FileWeights:
        """Open the files of ``module``, under the names that are in them."""
        return FileWeights(f"{self.where}, {module}", self.files[module])


def find_start(
    path: str, modules: tuple[str, ...], original_folders: Mapping[str, str]
) -> Start | None:
    """Look what ``path`` is, if it is no pipeline folder; None where it is one, or not here.

    Args:
        modules: names that transformers may have, the first that which is always there.
        original_folders: by module, the folder that the original code has an expert in.

    Raises:
        WeightsError: it is of a kind that nothing here can be trained from.
    """
    file = Path(path)
    folder = locate(path)
    hub = folder is None and is_hub_id(path) and "gguf" in path.lower()
    if hub or file.suffix == ".gguf" or (folder is not None and _holds_only_gguf(folder)):
        raise WeightsError(
            f"{path} holds GGUF weights: numbers in blocks of 2 to 8 bits, which mean nothing "
            "without their scales, and most of whose precision is gone. Take the 16-bit "
            "safetensors file or folder of the same model"
        )
    if folder is None and file.is_file():
        if file.suffix != ".safetensors":
            raise WeightsError(
                f"{path} is no safetensors file. apps/migrate --from {path} --to <folder> turns a "
                ".pt file of Self-Forcing or FastVideo into a checkpoint that a role can start "
                "from; any other must be saved as safetensors first"
            )
        return _start(path, {modules[0]: (file,)})
    if folder is None or (folder / "model_index.json").is_file():
        return None
    if any((folder / name).is_dir() for name in ("distributed_checkpoint", "dcp")):
        raise WeightsError(
            f"{path} is a checkpoint of FastVideo. Turn it into one of ours first: apps/migrate "
            f"--from {path} --to <folder>"
        )
    experts = {m: folder / name for m, name in original_folders.items() if (folder / name).is_dir()}
    if experts:
        return _start(path, {module: _files_of(part) for module, part in experts.items()})
    loras = {
        module: folder / f"{_LORA_STEM}{f'-{module}' * (module != modules[0])}.safetensors"
        for module in modules
    }
    if any(file.is_file() for file in loras.values()):
        start = _start(path, {m: (file,) for m, file in loras.items() if file.is_file()})
        return evolve(start, keeps_others=_has_all_loras(folder, loras.values()))
    if pair := _single_files(folder, modules):
        return _start(path, pair)
    files = _files_of(folder)
    return _start(path, {modules[0]: files}) if files else None


def choose_files(start: Start, modules: Collection[str], role: RoleSpec) -> Start:
    """Leave of ``start`` what ``role`` starts with: the files of all of its ``modules``, or of
    those that differ from its path.

    Files that name no module are those of a role's only expert.

    Raises:
        WeightsError: a module has no weights in it, or there are some of a module that a role of
            all experts does not have.
    """
    chosen = {name: files for name, files in start.files.items() if name in modules}
    if role.experts and len(modules) == len(start.files) == 1:
        chosen = dict(zip(modules, start.files.values(), strict=True))
    # Adapters are not merged into a base: each expert of a LoRA role needs its own.
    is_whole = chosen.keys() == set(modules) or (start.keeps_others and chosen and not role.lora)
    if not is_whole or (not role.experts and len(chosen) < len(start.files)):
        raise WeightsError(
            f"{start.where} holds weights of {', '.join(start.files)}, and role {role.name!r} is "
            f"built of {', '.join(modules)}; a role starts with all of its transformers. Name a "
            "folder that has them"
        )
    return evolve(start, files=chosen)


def whole_weights(start: Start, module: str, names: ForeignNames | None) -> WeightSource:
    """Give the weights of ``module`` under our names.

    Args:
        names: what the family knows of other codes' names; None: nothing.

    Raises:
        WeightsError: a name is of no weight of such a model.
    """
    source = start.source(module)
    places: dict[str, tuple[WeightSource, str]] = {}
    unknown: list[str] = []
    for plain, name in _without_prefix(source.describe()):
        ours = plain if names is None else names.ours(plain)
        if ours is not None:
            places[ours] = (source, name)
        elif names is None or not names.unused(plain):
            unknown.append(name)
    if unknown:
        raise WeightsError(
            f"{start.where}: {len(unknown)} of {len(source.describe())} names are of no weight of "
            f"this family's models ({', '.join(unknown[:4])}), so it is another model's, or not a "
            "transformer's. Name the file or folder of the transformer"
        )
    return JoinedWeights(source.where, places)


# -- LoRA -----------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Patch:
    """What is added to one parameter.

    Attributes:
        factors: names of A and B, and the scale of their product.
        difference: name of a tensor of the parameter's shape.
    """

    factors: tuple[str, str, float] | None = None
    difference: str | None = None


@frozen(kw_only=True, eq=False)
class Lora:
    """A LoRA file, by our names of the parameters that it changes."""

    source: FileWeights
    patches: Mapping[str, Patch]

    @property
    def ranks(self) -> dict[str, tuple[int, float]]:
        """(rank, scale) by layer."""
        sizes = self.source.describe()
        return {
            name.removesuffix(".weight"): (sizes[patch.factors[0]].size[0], patch.factors[2])
            for name, patch in self.patches.items()
            if patch.factors is not None
        }


def read_lora(
    start: Start, module: str, parameters: Iterable[str], names: ForeignNames | None,
    original_name: Callable[[str], str],
) -> Lora:  # fmt: skip
    """Read what a LoRA changes, whichever code wrote it.

    Args:
        parameters: our names of all that the model has.
        original_name: the original code's name of one of ours.

    Raises:
        WeightsError: a name is of nothing in the model, of a half adapter, or of a kind of adapter
            that is no LoRA.
    """
    parameters = set(parameters)
    # musubi-tuner writes dots as underscores, so that a layer is only found by trying all.
    flat = {
        f"{_MUSUBI}{form.removesuffix('.weight').replace('.', '_')}": name
        for name in sorted(parameters)
        for form in (name, original_name(name))
    }

    def parameter(stem: str, kind: str) -> str | None:
        """Find our name of ``kind`` ("weight", "bias" or "") of a layer."""
        if stem.startswith(_MUSUBI):
            weight = flat.get(stem)
            found = weight and re.sub(r"weight$", kind, weight) if kind else weight
        else:
            full = f"{stem}.{kind}" if kind else stem
            found = full if names is None else names.ours(full)
        return found if found in parameters else None

    source = start.source(module)
    default = _default_alpha(start.files[module])
    factors: dict[str, dict[str, str]] = {}
    alphas: dict[str, str] = {}
    scales: dict[str, str] = {}  # alpha / rank already
    differences: dict[str, str] = {}
    unknown: list[str] = []
    for plain, name in _without_prefix(source.describe()):
        match = _FACTOR.fullmatch(plain)
        stem, _, kind = plain.rpartition(".")
        found: str | None = None
        if match is not None:
            found = parameter(match["layer"], "weight")
            factors.setdefault(found or "", {})[_SIDES[match["side"]]] = name
        elif kind == "alpha":
            found = parameter(stem, "weight")
            alphas[found or ""] = name
        elif kind == "alpha_scale":
            found = parameter(stem, "weight")
            scales[found or ""] = name
        elif plain.endswith((".lora_B.bias", ".lora_up.bias", ".diff_b")):
            found = parameter(re.sub(r"\.(lora_B\.bias|lora_up\.bias|diff_b)$", "", plain), "bias")
            differences[found or ""] = name
        elif kind == "diff":
            found = parameter(stem, "weight") or parameter(stem, "")
            differences[found or ""] = name
        if found is None:
            unknown.append(name)
    halves = [names_ for names_ in factors.values() if len(names_) == 1]
    if unknown or halves:
        why = unknown or [name for half in halves for name in half.values()]
        raise WeightsError(
            f"{start.where}: {len(why)} of {len(source.describe())} names are no factor, alpha, "
            f"diff or diff_b of a layer of this model ({', '.join(why[:4])}); it is the LoRA of "
            "another model, half of one, or another kind of adapter. Name a LoRA of this one"
        )
    sizes = source.describe()
    patches: dict[str, Patch] = {}
    for target in dict.fromkeys([*factors, *differences]):
        pair = factors.get(target)
        product = None
        if pair is not None:
            rank = sizes[pair["A"]].size[0]
            alpha = default
            if target in alphas:
                alpha = float(source.read([alphas[target]])[alphas[target]])
            scale = 1.0 if alpha is None else alpha / rank
            if target in scales:
                scale = float(source.read([scales[target]])[scales[target]])
            product = (pair["A"], pair["B"], scale)
        patches[target] = Patch(factors=product, difference=differences.get(target))
    return Lora(source=source, patches=patches)


class PatchedWeights(WeightSource):
    """Whole weights with a LoRA added: ``W + scale B A + D``, in fp32, when they are read.

    Raises:
        WeightsError: a factor or a difference is of another shape than its parameter.
    """

    def __init__(self, base: WeightSource, lora: Lora) -> None:
        self._base, self._lora = base, lora
        self._infos = dict(base.describe())
        theirs = lora.source.describe()
        for name, patch in lora.patches.items():
            info, sizes = self._infos[name], []
            dtype = info.dtype
            if patch.factors is not None:
                a, b, _ = patch.factors
                sizes.append((theirs[b].size[0], theirs[a].size[1]))
                fits = theirs[a].size[0] == theirs[b].size[1]
                dtype = torch.promote_types(dtype, theirs[b].dtype)
            else:
                fits = True
            if patch.difference is not None:
                sizes.append(theirs[patch.difference].size)
                dtype = torch.promote_types(dtype, theirs[patch.difference].dtype)
            if not fits or any(size != info.size for size in sizes):
                raise WeightsError(
                    f"{lora.source.where} changes {name} by {sizes}, and {base.where} has it as "
                    f"{list(info.size)}; a LoRA fits only the model that it was made beside"
                )
            self._infos[name] = TensorInfo(info.size, dtype)

    @property
    def where(self) -> str:
        return f"{self._lora.source.where} merged into {self._base.where}"

    def describe(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = self._base.read(names)
        for name, tensor in tensors.items():
            patch = self._lora.patches.get(name)
            if patch is None:
                continue
            value = tensor.float()
            if patch.factors is not None:
                a, b, scale = patch.factors
                pair = self._lora.source.read([a, b])
                value = value + scale * (pair[b].float() @ pair[a].float())
            if patch.difference is not None:
                value = value + self._lora.source.read([patch.difference])[patch.difference].float()
            tensors[name] = value.to(self._infos[name].dtype)
        return tensors


@frozen(eq=False)
class LoraAdapters(WeightSource):
    """The factors of a LoRA under peft's names, with B scaled to the alpha / rank of a role.

    Attributes:
        scale: of the role.
    """

    lora: Lora
    scale: float
    _names: dict[str, tuple[str, float]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        for name, patch in self.lora.patches.items():
            assert patch.factors is not None
            a, b, scale = patch.factors
            ours = names_of(name.removesuffix(".weight"))
            self._names.update(zip(ours, ((a, 1.0), (b, scale / self.scale)), strict=True))

    @_names.default
    def _no_names(self) -> dict[str, tuple[str, float]]:
        return {}

    @property
    def where(self) -> str:
        return self.lora.source.where

    def describe(self) -> Mapping[str, TensorInfo]:
        theirs = self.lora.source.describe()
        return {
            ours: TensorInfo(theirs[name].size, torch.float32)
            for ours, (name, _) in self._names.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        chosen = {ours: self._names[ours] for ours in names}
        tensors = self.lora.source.read([name for name, _ in chosen.values()])
        return {ours: tensors[name].float() * factor for ours, (name, factor) in chosen.items()}


def check_is_roles_lora(lora: Lora, spec: LoraSpec, layers: Iterable[str]) -> None:
    """Refuse a LoRA that a role of ``spec`` on ``layers`` cannot start with.

    Raises:
        WeightsError: of another rank, on other layers, or with differences beside the factors.
    """
    layers, ranks = set(layers), lora.ranks
    others = {rank for rank, _ in ranks.values()} - {spec.rank}
    more = [n for n, patch in lora.patches.items() if patch.difference is not None]
    reasons = [
        f"is of rank {', '.join(map(str, sorted(others)))} and the role's of {spec.rank}"
        if others else "",
        f"is on {len(ranks)} layers and the role's on {len(layers)}"
        if ranks.keys() != layers else "",
        f"changes {len(more)} biases and other parameters, which adapters cannot" if more else "",
    ]  # fmt: skip
    if any(reasons):
        raise WeightsError(
            f"{lora.source.where} {'; '.join(filter(None, reasons))}. Give the role a LoRA of that "
            "rank on those layers, or none: it is then merged into the weights of the role's path"
        )


# -- files ----------------------------------------------------------------------------------------


def _start(path: str, files: Mapping[str, tuple[Path, ...]]) -> Start:
    names = [name for own in files.values() for name in FileWeights(path, own).describe()]
    is_lora = any(
        _FACTOR.fullmatch(name) or name.endswith((".diff", ".diff_b", ".dora_scale", ".hada_w1_a"))
        for name in names
    )
    return Start(where=path, files=files, is_lora=is_lora)


def _files_of(folder: Path) -> tuple[Path, ...]:
    """Find the files of one transformer in ``folder``: the shards of its index, or one file."""
    indexes = sorted(folder.glob(f"*{_INDEX}"))
    singles = sorted(folder.glob("*.safetensors"))
    if len(indexes) == 1:
        shards = read_json(indexes[0]).get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise WeightsError(
                f"{indexes[0]} has no weight_map of files beside it, so no shard is known; "
                "download it again"
            )
        return tuple(folder / name for name in names)
    if len(indexes) > 1 or len(singles) > 1:
        several = ", ".join(file.name for file in (indexes or singles)[:4])
        raise WeightsError(
            f"{folder} holds the weights of several models ({several}); which one is meant is "
            "unknown. Name one file"
        )
    return tuple(singles)


def _single_files(folder: Path, modules: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    """Find a file for each expert, named as exports for other codes are (``single_files``): x and
    ``x-transformer_2``; empty where there is nothing else than one transformer."""
    stems = {file.stem for file in folder.glob("*.safetensors")}
    for module in modules[1:]:
        for first in stems:
            if stems == {first, f"{first}-{module}"}:
                names = {modules[0]: first, module: f"{first}-{module}"}
                return {m: (folder / f"{stem}.safetensors",) for m, stem in names.items()}
    return {}


def _has_all_loras(folder: Path, loras: Iterable[Path]) -> bool:
    """Return whether ``folder`` is an export of ours, and holds those of ``loras`` that it wrote.

    A LoRA of somebody else, of which only one expert's file is here, may have lost the other.
    """
    if not (folder / SPEC_FILE).is_file():
        return False
    files = read_json(folder / SPEC_FILE).get("files")
    return isinstance(files, dict) and all(f.is_file() for f in loras if f.name in files)


def _holds_only_gguf(folder: Path) -> bool:
    return any(folder.glob("*.gguf")) and not any(folder.rglob("*.safetensors"))


def _without_prefix(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (name without prefix and with dots, name); of several parts the transformer's."""
    names = list(names)
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")
    for name in names:
        if name.startswith(prefix):
            yield name.removeprefix(prefix).replace(_DOT, "."), name


def _default_alpha(files: Iterable[Path]) -> float | None:
    """Read alpha where a file states it once for all layers: in diffusers' metadata, or in peft's
    configuration beside it."""
    for file in files:
        settings: Any = {}
        if text := metadata_of(file).get("lora_adapter_metadata"):
            settings = parse_json(text, f"lora_adapter_metadata of {file}")
            if not isinstance(settings, dict):
                raise WeightsError(f"lora_adapter_metadata of {file} is no JSON object")
            settings = {k.rpartition("transformer.")[2]: v for k, v in settings.items()}
        elif (file.parent / "adapter_config.json").is_file():
            settings = read_json(file.parent / "adapter_config.json")
        if any(settings.get(k) for k in ("alpha_pattern", "use_rslora", "use_dora")):
            raise WeightsError(
                f"{file} is a LoRA whose scale differs from layer to layer (alpha_pattern, rslora "
                "or DoRA), which is not read. Merge it with the code that made it"
            )
        alpha = settings.get("lora_alpha")
        if alpha is not None:
            if type(alpha) not in (int, float) or not alpha > 0:
                raise WeightsError(
                    f"{file} is a LoRA with lora_alpha {alpha!r:.40}, which must be a number above "
                    "0; it is damaged. Export it again"
                )
            return float(alpha)
    return None
