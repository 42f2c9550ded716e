"""Weights made of other weights when they are read, so that no whole model is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_protocols import DTYPES, Precision, TensorInfo, WeightsError, WeightSource
from torch import Tensor

from distill_diffusers.roles.lora import adapter_names, merge

_KEPT_WIDE = frozenset(WanTransformer3DModel._keep_in_fp32_modules or ())


def stays_wide(name: str) -> bool:
    """Whether diffusers keeps a parameter in fp32 when the rest has 16 bits.

    Time embedding, the block norms and the scale/shift tables; 16 bits harm these.
    """
    return not _KEPT_WIDE.isdisjoint(name.split("."))


class MergedWeights(WeightSource):
    """``W + scale B A`` of each adapted layer, and the base's own weights of the others.

    Merged in fp32; a merged weight is as wide as the wider of base and adapter, for a base in 16
    bits would round most of a small update away.

    Args:
        base: whole, under Diffusers' names.
        adapters: those alone, under ``lora.names_of``.

    Raises:
        WeightsError: an adapter has no layer of its size in ``base``.
    """

    def __init__(self, base: WeightSource, adapters: WeightSource, scale: float) -> None:
        self._base = base
        self._adapters = adapters
        self._scale = scale
        given, theirs = base.describe(), adapters.describe()
        self._facts = dict(given)
        self._pairs: dict[str, tuple[str, str]] = {}
        for layer, (a, b) in adapter_names(theirs).items():
            name = f"{layer}.weight"
            size = (theirs[b].size[0], theirs[a].size[1])
            if name not in given or given[name].size != size:
                raise WeightsError(
                    f"{adapters.where} adapts {name} {list(size)}, and {base.where} has "
                    f"{given.get(name, 'no such weight')}; a LoRA fits only the base that it was "
                    "trained beside. Name that base"
                )
            wide = torch.promote_types(given[name].dtype, theirs[b].dtype)
            self._facts[name] = TensorInfo(size, wide)
            self._pairs[name] = (a, b)

    @property
    def where(self) -> str:
        return f"{self._adapters.where} merged into {self._base.where}"

    def describe(self) -> Mapping[str, TensorInfo]:
        return self._facts

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        found = self._base.read(names)
        for name in names:
            if name in self._pairs:
                a, b = self._pairs[name]
                pair = self._adapters.read((a, b))
                merged = merge(found[name], pair[a], pair[b], self._scale)
                found[name] = merged.to(self._facts[name].dtype)
        return found


class CastWeights(WeightSource):
    """Another precision: fp32, or 16 bits where these do no harm (see ``stays_wide``).

    ``from_pretrained(torch_dtype=...)`` of what is written so gives, bit for bit, what it gives of
    the weights before: it rounds the same ones and keeps the same ones.
    """

    def __init__(self, source: WeightSource, precision: Precision) -> None:
        self._source = source
        self._dtype = DTYPES[precision]

    @property
    def where(self) -> str:
        return self._source.where

    def describe(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(facts.size, torch.float32 if stays_wide(name) else self._dtype)
            for name, facts in self._source.describe().items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        facts = self.describe()
        found = self._source.read(names)
        return {name: narrowed(t, facts[name].dtype, name) for name, t in found.items()}


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` as ``dtype``.

    Raises:
        WeightsError: a finite number is too large for it (fp16 ends at 65504).
    """
    cast = tensor.to(dtype)
    if dtype == torch.float16 and bool((cast.isinf() & tensor.isfinite()).any()):
        raise WeightsError(
            f"{name} holds {tensor.abs().max().item():g}, and fp16 ends at 65504: it would become "
            "infinite, and every clip black. Export in bf16 or fp32"
        )
    return cast
