"""The settings of one role: its options, and what a family needs to load it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from attrs import field, fields, frozen

from distill_protocols.validators import above, at_least, within

Precision = Literal["fp32", "bf16", "fp16"]


EXIT_EMBEDDING = "exit_embedding"
"""The module of a role beside its transformers that has an embedding for each exit step."""


@frozen(kw_only=True)
class ExitSpec:
    """A learned embedding of the exit step of a clip, added to a model's time embedding.

    An exit step is the sampler's step whose call made a clip of the student in training.

    Attributes:
        count: how many exit steps there are.
        by_frame: the frames of one clip may have different ones.
    """

    count: int = field(validator=at_least(1, "it counts exit steps"))
    by_frame: bool = False


@frozen(kw_only=True)
class TargetTimeSpec:
    """A second time embedder of a transformer, which tells it the time r that a call leads to.

    Models of average velocities between two times, flow maps, have it (MeanFlow, Geng et al. 2025;
    AnyFlow, arXiv:2605.13724). It starts as a copy of the first one.

    Attributes:
        gate: g of ``(1 - g) e(t) + g e2(r)``, which is e(t) at r = t where the two are alike.
    """

    gate: float = field(
        default=0.25, validator=within(0, 1, "it is the share of the second time embedding")
    )


@frozen(kw_only=True)
class RoleNeed:
    """A role that a method calls, and whether it trains it.

    Attributes:
        help: what it is, in a few words.
        reason: why the method cannot do without it, and what can be done without one; part of the
            error where it is missing. Empty where the reason is obvious.
        features_of: of a discriminator: the roles whose features it may read, one of them; empty:
            the role is a model by itself.
        exits: the exit steps that the role is told (``ExitConditioning``); None: none.
        target_time: of a role that is a flow map (``FlowMaps``); None: it is told t alone.
    """

    name: str
    trainable: bool
    help: str = ""
    reason: str = ""
    features_of: tuple[str, ...] = ()
    exits: ExitSpec | None = None
    target_time: TargetTimeSpec | None = None


@frozen(kw_only=True)
class LoraSpec:
    """Low-rank adapters ``W + (alpha / rank) B A`` beside frozen weights (Hu et al. 2021, eq. 3).

    Attributes:
        rank: columns of B and rows of A.
        alpha: scale; left out, ``rank``, so that the factor is 1.
        target_modules: ends of the names of the linear layers that get one, as in peft
            (``to_q`` is every block's); left out, the family's choice.
    """

    rank: int = field(validator=at_least(1, "it counts the columns of B; 16 to 128 is customary"))
    alpha: float | None = field(default=None)
    target_modules: tuple[str, ...] = field(default=())

    @alpha.validator
    def _check_alpha(self, attribute: object, value: float | None) -> None:
        if value is not None:
            above(0, "at 0 the adapter has no effect. Leave it out for alpha = rank")(
                self, attribute, value
            )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def _names_each_once(_: Any, __: Any, value: tuple[str, ...]) -> None:
    if len(set(value)) != len(value):
        raise ValueError(f"{list(value)} names an expert twice; each is loaded once")


def _blocks_of_heads(_: Any, __: Any, value: tuple[int, ...]) -> None:
    if not value or len(set(value)) != len(value) or min(value) < 0:
        raise ValueError(
            f"{list(value)} must name at least one block, each once and counted from 0: there is "
            "one head for each"
        )


@frozen(kw_only=True)
class DiscriminatorSpec:
    """A discriminator: small networks, each on the hidden states of one block of another role.

    Attributes:
        on: the role whose features they read.
        blocks: indices of its blocks, from 0; one head each.
        width: channels within a head.
    """

    on: str
    blocks: tuple[int, ...] = field(validator=_blocks_of_heads)
    width: int = field(
        default=256, validator=at_least(1, "it counts channels; 64 to 512 is customary")
    )


@frozen(kw_only=True)
class FsdpPolicy:
    """How one role is spread over processes (``torch.distributed.fsdp.fully_shard``).

    Attributes:
        shard: each process holds a part of every weight, and all of a block only while it is
            called. false: each holds all of it.
        blocks: names of the module lists (``blocks``) whose entries are gathered one at a time;
            left out, the family's choice.
        mixed_precision: gather weights in 16 bits: half the traffic, but norms and modulation
            tables are rounded too. Left out, they are gathered as they are stored, and a call
            gives the numbers of a single process.
        reduce_precision: in which gradients are summed over the processes.
        reshard_after_forward: free the gathered weights after each forward pass, and gather them
            again for the backward pass. false: faster, and all weights at once in memory.
        cpu_offload: parts, their gradients and moments stay in host memory between calls.
    """

    shard: bool = True
    blocks: tuple[str, ...] = ()
    mixed_precision: Literal["bf16", "fp16"] | None = None
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    reshard_after_forward: bool = True
    cpu_offload: bool = False


@frozen(kw_only=True)
class CompileSpec:
    """``torch.compile`` of a role's repeated blocks, each by itself.

    Attributes:
        backend, mode, dynamic: as in ``torch.compile``.
    """

    backend: str = "inductor"
    mode: str | None = None
    dynamic: bool | None = None


OF_WEIGHTS: Mapping[str, bool] = MappingProxyType({"of_weights": True})
"""Metadata of an option for how weights are held."""


@frozen(kw_only=True)
class RoleOptions:
    """How one role is built and kept in memory. A run file's ``models.<role>`` has these keys.

    The run file, the plan and the loading pass the whole object on, so a new option is added here,
    named by the families that honour it (``FamilyPlugin.role_options``; any other that is set is
    refused), and used where they load a role (``RoleLoader`` of distill-diffusers). ``compile`` is
    the example to follow. One that changes how weights are held is marked ``OF_WEIGHTS``: a role
    beside the weights of another has it from there. It also changes what a plan counts
    (``stored_dtype`` in distill-diffusers).

    Attributes:
        precision: compute precision of the role's calls; None: fp32, or that of ``base``.
        base: train ``lora`` beside the weights of this frozen role, which are in memory once.
        lora: train low-rank adapters beside the role's weights, which stay as they are.
        heads: the role is a discriminator: small networks on the features of another role's
            blocks.
        fsdp: how it is spread over processes; None: as the run's strategy states.
        activation_checkpointing: keep only the inputs of its blocks for the backward pass, which
            computes the rest again.
        compile: ``torch.compile`` its blocks; ``{}`` as torch does it by itself.
        offload: its weights wait in host memory while other roles are called; frozen roles only.
        attention_backend: name of the kernel that its attention layers use, as the family lists
            them (``FamilyPlugin.attention_backends``); None: the library's own choice.
        experts: names of the modules that the role has, of a model that has one for each range of
            t; empty: all of them. Only these are loaded, and the role is called at their t alone.
    """

    precision: Precision | None = field(default=None, metadata=OF_WEIGHTS)
    base: str | None = None
    lora: LoraSpec | None = None
    heads: DiscriminatorSpec | None = None
    fsdp: FsdpPolicy | None = field(default=None, metadata=OF_WEIGHTS)
    activation_checkpointing: bool = False
    compile: CompileSpec | None = None
    offload: bool = False
    attention_backend: str | None = None
    experts: tuple[str, ...] = field(default=(), validator=_names_each_once)

    @staticmethod
    def of_weights() -> tuple[str, ...]:
        """Return names of the options that say how weights are held: a role and its base have the
        same."""
        return tuple(f.name for f in fields(RoleOptions) if f.metadata.keys() & OF_WEIGHTS.keys())

    def options_set(self) -> tuple[str, ...]:
        """Return names of the options that differ from their defaults, without ``precision``, which
        every family honours."""
        return tuple(
            f.name
            for f in fields(RoleOptions)
            if f.name != "precision" and getattr(self, f.name) != f.default
        )


@frozen(kw_only=True)
class RoleSpec(RoleOptions):
    """One role with nothing left open: what a family needs to load or plan it.

    Attributes:
        name: of the role.
        path: a Diffusers-format folder, absolute, or a hub id such as ``Wan-AI/...``; of a
            discriminator, that of the role that it is on.
        trainable: whether the run trains it.
        precision: compute precision of its calls.
        exits: the exit steps that it is told, as the method needs it; None: none.
        target_time: how it is told the time that a call leads to, as the method needs it.
    """

    name: str
    path: str
    trainable: bool
    precision: Precision = "fp32"
    exits: ExitSpec | None = None
    target_time: TargetTimeSpec | None = None
