"""What the shared code needs to know of a model class, as one value a class. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from attrs import field, frozen

TRAIN_STEPS = 1000.0
"""t at pure noise, of every family."""

TARGET_GATE = "target_time_gate"
"""Entry of the configuration of a transformer that is a flow map: g of its two time embeddings."""

EXPERTS = "experts"
"""Entry of ``RoleHandle.call_options``: ``RoleOptions.experts``, where it names some."""


@frozen(kw_only=True)
class ModelKind:
    """A transformer class of diffusers and the pipeline folders that it stands in.

    Classes are named as ``module:Class`` and imported when they are needed: the module itself and
    not diffusers' pipeline package, which takes several times as long.

    Attributes:
        transformer: the class of the trained module.
        vae: the class of the folder's VAE.
        pipelines: classes that ``model_index.json`` may name, the first where it names none; empty
            where diffusers has no pipeline of the model.
        has_index: whether a folder has a ``model_index.json``, as all folders of diffusers'
            pipelines. Without one its transformers are those of ``modules`` that it has folders of.
        modules: names of the transformers in a folder; the first is always there, the others
            where the index has them (experts).
        call_options: entries of ``model_index.json`` that say how the transformers are called,
            with their values where the index has none. They become ``RoleHandle.call_options``.
        stored_like: name of a parameter that no LoRA is ever put on and that is stored in the
            precision of the role: which precision a call has is read off it.
        lora_targets: ends of the names of the linear layers that get an adapter by default; empty:
            every linear layer within the blocks.
        block_lists: names of the module lists whose entries are sharded, compiled, checkpointed
            and read one at a time; empty: found on the meta module (``find_block_lists``).
        depths: entries of the transformer's configuration with the numbers of blocks, of the first
            of the block lists and of those after it, as far as plans extrapolate from a few.
        width: entry of the configuration with the channels of a token between two blocks; empty:
            those that the last linear layer of a block gives.
        attention_bias: whether the transformer adds a bias to the scores of its attention, as where
            it hides the padding of a text: only some kernels can.
        time_embedder: dotted name of the layer that turns features of t into the embedding that
            modulates all blocks, which an embedding of exit steps is added to; empty: roles cannot
            be told exit steps.
        time_features: dotted name of the layer that turns t into the input of ``time_embedder``;
            needed beside ``target_embedder``.
        target_embedder: dotted name that the second time embedder of a role has that is a flow map,
            which is its name in exports; empty: roles cannot be flow maps.
        foreign_layers: names of layers in other codes -> theirs here, for hints.
    """

    transformer: str
    vae: str
    pipelines: tuple[str, ...] = ()
    has_index: bool = True
    modules: tuple[str, ...] = ("transformer",)
    call_options: Mapping[str, object] = field(default=MappingProxyType({}))
    stored_like: str
    lora_targets: tuple[str, ...] = ()
    block_lists: tuple[str, ...] = ()
    depths: tuple[str, ...] = ("num_layers",)
    width: str = ""
    attention_bias: bool = False
    time_embedder: str = ""
    time_features: str = ""
    target_embedder: str = ""
    foreign_layers: Mapping[str, str] = field(default=MappingProxyType({}))


def load_class(name: str) -> type[Any]:
    """Return the class ``module:Class``."""
    module, _, attribute = name.partition(":")
    return vars(import_module(module))[attribute]


def class_name(name: str) -> str:
    """``Class`` of ``module:Class``."""
    return name.partition(":")[2]
