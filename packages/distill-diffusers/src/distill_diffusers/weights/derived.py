"""Weights made of other weights when they are read, so that no whole model is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from distill_protocols import DTYPES, Precision, TensorInfo, WeightsError, WeightSource
from torch import Tensor

from distill_diffusers.architecture import is_kept_in_fp32
from distill_diffusers.lora import adapter_names, merge


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
        weights, factors = base.describe(), adapters.describe()
        self._infos = dict(weights)
        self._pairs: dict[str, tuple[str, str]] = {}
        for layer, (a, b) in adapter_names(factors).items():
            name = f"{layer}.weight"
            size = (factors[b].size[0], factors[a].size[1])
            if name not in weights or weights[name].size != size:
                raise WeightsError(
                    f"{adapters.where} adapts {name} {list(size)}, and {base.where} has "
                    f"{weights.get(name, 'no such weight')}; a LoRA fits only the base that it was "
                    "trained beside. Name that base"
                )
            wide = torch.promote_types(weights[name].dtype, factors[b].dtype)
            self._infos[name] = TensorInfo(size, wide)
            self._pairs[name] = (a, b)

    @property
    def where(self) -> str:
        return f"{self._adapters.where} merged into {self._base.where}"

    def describe(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        weights = self._base.read(names)
        for name in names:
            if name in self._pairs:
                a, b = self._pairs[name]
                pair = self._adapters.read((a, b))
                merged = merge(weights[name], pair[a], pair[b], self._scale)
                weights[name] = merged.to(self._infos[name].dtype)
        return weights


class CastWeights(WeightSource):
    """Another precision: fp32, or 16 bits where these do no harm.

    ``from_pretrained(torch_dtype=...)`` of what is written so gives, bit for bit, what it gives of
    the weights before: it rounds the same ones and keeps the same ones.

    Args:
        kept_in_fp32: parts of the names of those that stay in fp32 (``architecture.kept_in_fp32``).
    """

    def __init__(
        self, source: WeightSource, precision: Precision, kept_in_fp32: frozenset[str]
    ) -> None:
        self._source = source
        self._dtype = DTYPES[precision]
        self._kept_in_fp32 = kept_in_fp32

    @property
    def where(self) -> str:
        return self._source.where

    def describe(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(
                info.size,
                torch.float32 if is_kept_in_fp32(name, self._kept_in_fp32) else self._dtype,
            )
            for name, info in self._source.describe().items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        infos = self.describe()
        tensors = self._source.read(names)
        return {name: round_to(t, infos[name].dtype, name) for name, t in tensors.items()}


def round_to(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round ``tensor`` to ``dtype``.

    Raises:
        WeightsError: a finite number is too large for it (fp16 ends at 65504).
    """
    rounded = tensor.to(dtype)
    if dtype == torch.float16 and bool((rounded.isinf() & tensor.isfinite()).any()):
        raise WeightsError(
            f"{name} holds {tensor.abs().max().item():g}, and fp16 ends at 65504: it would become "
            "infinite, and every clip black. Export in bf16 or fp32"
        )
    return rounded
