"""Put peft's adapters into a transformer, empty, and draw their first values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from attrs import frozen
from distill_protocols import LoraSpec, TensorInfo, WeightsError, WeightSource, derive_seed
from peft import LoraConfig, inject_adapter_in_model
from peft import __version__ as peft_version
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from distill_diffusers.lora import ADAPTER, names_of


def inject(module: nn.Module, layers: Iterable[str], lora: LoraSpec) -> frozenset[str]:
    """Put an adapter on each of ``layers``, on the meta device; return their parameters' names.

    ``inject_adapter_in_model`` and not diffusers' ``add_adapter``, which cannot leave them empty
    and so draws from the global generator.

    Raises:
        WeightsError: this peft adapted other layers, or calls their parameters otherwise: then
            nothing that is saved or exported under these names would be what trained.
    """
    layers = list(layers)
    alpha = lora.rank if lora.alpha is None else lora.alpha
    # Whole names: of an end such as "0" peft would also try what is no linear layer.
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=layers)  # type: ignore[arg-type]
    inject_adapter_in_model(config, module, ADAPTER, low_cpu_mem_usage=True)
    injected = frozenset(
        f"{layer}.{name}"
        for layer, part in module.named_modules()
        if isinstance(part, LoraLayer)
        for name, _ in module.get_submodule(layer).named_parameters()
        if not name.startswith("base_layer.")
    )
    expected = frozenset(name for layer in layers for name in names_of(layer))
    if injected != expected:
        odd = sorted(injected ^ expected)
        raise WeightsError(
            f"peft {peft_version} gave {len(injected)} adapter parameters where {len(expected)} "
            f"were asked for; the difference begins with {', '.join(odd[:4])}. Install a version "
            "of peft that this package's bounds allow"
        )
    return injected


@frozen(eq=False)
class InitialAdapters(WeightSource):
    """The first values of adapters, in fp32: A as peft draws it, B zero, so that B A = 0.

    Each is a function of seed, role, module and its own name: no other draw, layer or role changes
    it, and a process that keeps a part of it draws the whole and cuts.

    Attributes:
        shapes: by name.
    """

    role: str
    module: str
    shapes: Mapping[str, torch.Size]
    seed: int

    @property
    def where(self) -> str:
        return f"new adapters of role {self.role!r}"

    def describe(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(s), torch.float32) for name, s in self.shapes.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._draw(name) for name in names}

    def _draw(self, name: str) -> Tensor:
        value = torch.zeros(self.shapes[name])
        if ".lora_A." in name:
            seed = derive_seed(self.seed, "lora", self.role, self.module, name)
            generator = torch.Generator().manual_seed(seed)
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        return value
