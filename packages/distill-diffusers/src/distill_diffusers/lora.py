"""LoRA of a transformer: which layers it is on, and the names of its parameters.

``W' = W + scale B A`` (Hu et al. 2021, eq. 3), A [rank, in], B [out, rank], scale = alpha / rank.
Where peft has put adapters into a module, layer ``L`` has three weights::

    L.base_layer.weight     W, and L.base_layer.bias: frozen
    L.lora_A.default.weight A
    L.lora_B.default.weight B
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from distill_protocols import LoraSpec, WeightsError

from distill_diffusers.architecture import Architecture, has_suffix

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "default"
"""The name that peft knows the adapter by; it is part of every parameter's name."""
_SIDE = re.compile(rf"(?P<layer>.+)\.lora_(?P<side>[AB])\.{ADAPTER}\.weight")


def names_of(layer: str) -> tuple[str, str]:
    """Give (name of A, name of B) of a layer."""
    return f"{layer}.lora_A.{ADAPTER}.weight", f"{layer}.lora_B.{ADAPTER}.weight"


def adapter_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Find the pairs (name of A, name of B) among ``names``, by layer (``blocks.0.attn1.to_q``).

    Names that are no adapter's are left out.

    Raises:
        WeightsError: one of the two is missing.
    """
    names = set(names)
    layers = dict.fromkeys(m["layer"] for name in sorted(names) if (m := _SIDE.fullmatch(name)))
    pairs = {layer: names_of(layer) for layer in layers}
    halves = [name for pair in pairs.values() for name in pair if name not in names]
    if halves:
        raise WeightsError(
            f"LoRA without its other half: {', '.join(halves[:4])} missing ({len(halves)} in all); "
            "an adapter is the product B A. Take both from one checkpoint"
        )
    return pairs


def is_adapter(name: str) -> bool:
    """Return whether ``name`` is the name of an A or a B."""
    return _SIDE.fullmatch(name) is not None


def base_name(name: str) -> str:
    """Turn the name of a base parameter of a module with adapters into its Diffusers name."""
    return name.replace(".base_layer.", ".")


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute ``weight + scale b a`` [out, in] in fp32; the caller rounds, once.

    For an fp32 weight it is, bit for bit, what peft's own merge gives.
    """
    return weight.float() + (b.float() @ a.float()) * scale


def adapted_layers(architecture: Architecture, lora: LoraSpec) -> dict[str, tuple[int, int]]:
    """Give (in, out) of the layers that get an adapter, in the model's order."""
    layers = architecture.linear_layers
    if not lora.target_modules:
        return {name: layers[name] for name in architecture.lora_layers}
    return {
        name: size
        for name, size in layers.items()
        if any(has_suffix(name, target) for target in lora.target_modules)
    }


def target_problems(
    architecture: Architecture, lora: LoraSpec, foreign_layers: Mapping[str, str]
) -> Iterator[str]:
    """Report targets that are the end of no linear layer's name.

    Args:
        foreign_layers: ``ModelKind.foreign_layers``.
    """
    # Each kind of layer once: a block's without its number.
    blocks = re.compile(rf"^({'|'.join(map(re.escape, architecture.block_lists))})\.\d+\.")
    kinds = list(dict.fromkeys(blocks.sub("", name) for name in architecture.linear_layers))
    for target in lora.target_modules:
        if not any(has_suffix(name, target) for name in architecture.linear_layers):
            yield (
                f"{target!r} is the end of no linear layer's name, so it would train nothing"
                f"{_hint(target, kinds, foreign_layers)} Linear layers: {', '.join(kinds)}"
            )


def _hint(target: str, kinds: Iterable[str], foreign_layers: Mapping[str, str]) -> str:
    if target in foreign_layers:
        ours = foreign_layers[target]
        return f"; {target!r} is the original code's name, diffusers calls it {ours!r}."
    ends = {".".join(parts[i:]) for n in kinds if (parts := n.split(".")) for i in range(9)}
    near = difflib.get_close_matches(target, sorted(ends - {""}), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
