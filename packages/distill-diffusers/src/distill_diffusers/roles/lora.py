"""LoRA of a Wan transformer: which layers, under which names, how many parameters. No torch.

``W' = W + scale B A`` (Hu et al. 2021, eq. 3), A [rank, in], B [out, rank], scale = alpha / rank.
Where peft has put adapters into a module, layer ``L`` has three weights::

    L.base_layer.weight     W, and L.base_layer.bias: frozen
    L.lora_A.default.weight A
    L.lora_B.default.weight B
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from distill_protocols import LoraSpec, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "default"
"""The name that peft knows the adapter by; it stands in every parameter's name."""
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""All linear layers of a block: what musubi-tuner and DiffSynth-Studio train of Wan."""
_ORIGINAL = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
"""Names of Wan's original code, which other trainers' configurations have -> those of diffusers."""
_SIDE = re.compile(rf"(?P<layer>.+)\.lora_(?P<side>[AB])\.{ADAPTER}\.weight")


def names_of(layer: str) -> tuple[str, str]:
    """(name of A, name of B) of a layer."""
    return f"{layer}.lora_A.{ADAPTER}.weight", f"{layer}.lora_B.{ADAPTER}.weight"


def adapter_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """By layer (``blocks.0.attn1.to_q``), the (name of A, name of B) among ``names``.

    Other names are left out.

    Raises:
        WeightsError: one of the two is missing.
    """
    given = set(names)
    layers = dict.fromkeys(m["layer"] for name in sorted(given) if (m := _SIDE.fullmatch(name)))
    found = {layer: names_of(layer) for layer in layers}
    halves = [name for pair in found.values() for name in pair if name not in given]
    if halves:
        raise WeightsError(
            f"LoRA without its other half: {', '.join(halves[:4])} missing ({len(halves)} in all); "
            "an adapter is the product B A. Take both from one checkpoint"
        )
    return found


def is_adapter(name: str) -> bool:
    """Whether ``name`` is that of an A or a B."""
    return _SIDE.fullmatch(name) is not None


def base_name(name: str) -> str:
    """The Diffusers name of a base parameter of a module with adapters."""
    return name.replace(".base_layer.", ".")


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``weight + scale b a`` [out, in] in fp32; the caller rounds, once.

    For an fp32 weight it is, bit for bit, what peft's own merge gives.
    """
    return weight.float() + (b.float() @ a.float()) * scale


def linear_layers(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer of the ``WanTransformer3DModel`` of ``config``, in order."""
    numbers = {**DEFAULTS, **config}
    width = numbers["num_attention_heads"] * numbers["attention_head_dim"]
    block = _block_layers(width, numbers)
    outputs = (numbers["out_channels"] or numbers["in_channels"]) * math.prod(numbers["patch_size"])
    return {
        **_embedder_layers(width, numbers),
        **{f"blocks.{i}.{k}": v for i in range(numbers["num_layers"]) for k, v in block.items()},
        "proj_out": (width, outputs),
    }


DEFAULTS: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": None,
    "added_kv_proj_dim": None,
}
"""Of ``WanTransformer3DModel.__init__``."""


def _embedder_layers(width: int, numbers: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    layers = {
        "time_embedder.linear_1": (numbers["freq_dim"], width),
        "time_embedder.linear_2": (width, width),
        "time_proj": (width, 6 * width),
        "text_embedder.linear_1": (numbers["text_dim"], width),
        "text_embedder.linear_2": (width, width),
    }
    image = numbers["image_dim"]
    if image is not None:
        layers["image_embedder.ff.net.0.proj"] = (image, image)
        layers["image_embedder.ff.net.2"] = (image, width)
    return {f"condition_embedder.{name}": size for name, size in layers.items()}


def _block_layers(width: int, numbers: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    square = (width, width)
    layers = {
        f"{attention}.{name}": square
        for attention in ("attn1", "attn2")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    added = numbers["added_kv_proj_dim"]
    if added is not None:
        layers["attn2.add_k_proj"] = layers["attn2.add_v_proj"] = (added, width)
    layers["ffn.net.0.proj"] = (width, numbers["ffn_dim"])
    layers["ffn.net.2"] = (numbers["ffn_dim"], width)
    return layers


def adapted_layers(config: Mapping[str, Any], lora: LoraSpec) -> dict[str, tuple[int, int]]:
    """(in, out) of the layers that get an adapter, in the model's order."""
    targets = lora.target_modules or DEFAULT_TARGETS
    layers = linear_layers(config)
    return {n: size for n, size in layers.items() if any(_ends(n, target) for target in targets)}


def adapter_parameters(config: Mapping[str, Any], lora: LoraSpec) -> int:
    """How many parameters the adapters have: rank (in + out) a layer."""
    return sum(lora.rank * sum(size) for size in adapted_layers(config, lora).values())


def target_problems(config: Mapping[str, Any], lora: LoraSpec) -> Iterator[str]:
    """Targets that are the end of no linear layer's name."""
    layers = linear_layers(config)
    for target in lora.target_modules:
        if not any(_ends(name, target) for name in layers):
            yield (
                f"{target!r} is the end of no linear layer's name, so it "
                f"would train nothing{_meant(target, layers)} Linear layers: "
                f"{', '.join(_told(layers))}"
            )


def _ends(name: str, target: str) -> bool:
    """As peft matches: whole parts of the dotted name."""
    return name == target or name.endswith(f".{target}")


def _told(layers: Iterable[str]) -> list[str]:
    """Each kind of layer once: a block's without its number."""
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in layers))


def _meant(target: str, layers: Iterable[str]) -> str:
    if target in _ORIGINAL:
        return f"; {target!r} is Wan's original name, diffusers calls it {_ORIGINAL[target]!r}."
    ends = {".".join(parts[i:]) for n in _told(layers) if (parts := n.split(".")) for i in range(9)}
    near = difflib.get_close_matches(target, sorted(ends - {""}), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
