"""Plugins: families, methods and callbacks, found through entry points.

An entry point in the group ``distill.families``, ``distill.methods`` or ``distill.callbacks``
names an *instance* of a plugin class below, in a module that imports no torch: a wrong run file
is answered before anything heavy is imported. Heavy imports belong inside ``build``, ``load`` ...
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen

from distill_protocols.capabilities import Capabilities
from distill_protocols.errors import PluginError
from distill_protocols.sampler import SamplerSpec
from distill_protocols.validators import above, at_least

if TYPE_CHECKING:
    import torch

    from distill_protocols.adapter import DistillAdapter, Exporter
    from distill_protocols.batch import ConditioningProvider
    from distill_protocols.bundle import CallPlan, ModelBundle, Precision, RoleHandle, RolePlan
    from distill_protocols.callbacks import Callback
    from distill_protocols.method import DistillMethod
    from distill_protocols.random import RandomStreams
    from distill_protocols.weights import WeightSource

EMPTY: Mapping[str, Any] = MappingProxyType({})

Group = Literal["distill.families", "distill.methods", "distill.callbacks"]


@frozen(kw_only=True)
class RoleNeed:
    """A role that a method calls, and whether it trains it.

    Attributes:
        help: what it is, in a few words.
        reason: why the method cannot do without it, and what a person can who has none; said
            where it is missing. Empty where that goes without saying.
        heads_on: of a discriminator: the roles whose features it may be heads on, one of them;
            empty: the role is a model by itself.
    """

    name: str
    trainable: bool
    help: str = ""
    reason: str = ""
    heads_on: tuple[str, ...] = ()


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


def _blocks_of_heads(_: Any, __: Any, value: tuple[int, ...]) -> None:
    if not value or len(set(value)) != len(value) or min(value) < 0:
        raise ValueError(
            f"{list(value)} must name at least one block, each once and counted from 0: there is "
            "one head for each"
        )


@frozen(kw_only=True)
class HeadSpec:
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


@frozen(kw_only=True)
class RoleSpec:
    """Where one role comes from: what a family needs to load or plan it.

    Attributes:
        path: a Diffusers-format folder, absolute, or a hub id such as ``Wan-AI/...``; of heads,
            that of the role that they are on.
        fsdp: how it is spread over processes; None: as the run's strategy says.
        lora: train low-rank adapters beside the weights of ``path``, which stay as they are.
        base: a frozen role of the same ``path`` and ``precision`` whose weights those are: held
            once, whatever the number of roles beside it. Needs ``lora``.
        activation_checkpointing: keep only the inputs of blocks for the backward pass.
        compile: compile its blocks.
        offload: weights wait in host memory while other roles are called (frozen roles).
        heads: it is a discriminator, and has no model of its own.
    """

    name: str
    path: str
    trainable: bool
    precision: Precision = "fp32"
    fsdp: FsdpPolicy | None = None
    lora: LoraSpec | None = None
    base: str | None = None
    activation_checkpointing: bool = False
    compile: CompileSpec | None = None
    offload: bool = False
    heads: HeadSpec | None = None


ExportFormat = Literal["diffusers", "comfyui", "lora"]
"""A pipeline folder; one file under the model's original names; low-rank adapters only."""


@frozen(kw_only=True)
class ExportRequest:
    """What an export shall be.

    Attributes:
        sampler: how the role is sampled; it is written beside the weights.
        weights: which weights of the role these are, for the record.
        format: see ``ExportFormat``. A LoRA role is merged into its base for the first two.
        precision: of the written weights; None: as they are stored.
        lora_rank: for ``lora`` of a role that is none: the rank of the difference to its base,
            taken by singular value decomposition.
        max_shard_bytes: largest weight file of a pipeline folder.
    """

    sampler: SamplerSpec
    weights: Literal["live", "ema"] = "live"
    format: ExportFormat = "diffusers"
    precision: Precision | None = None
    lora_rank: int | None = None
    max_shard_bytes: int = 5 * 1000**3


@frozen(kw_only=True)
class ForeignNames:
    """What a family knows of the names that its weights have in other codes.

    Attributes:
        ours: their name -> ours; None for a name that it does not know.
        unused: whether a name, though not one of ours, is of a weight that has no effect.
        missing: of all our names of one module, those that it lacks to be whole.
    """

    ours: Callable[[str], str | None]
    unused: Callable[[str], bool] = lambda name: False
    missing: Callable[[Iterable[str]], Sequence[str]] = lambda names: ()


class MethodPlugin(ABC):
    """An algorithm, as the app sees it before torch is imported."""

    name: ClassVar[str]
    help: ClassVar[str]
    config_class: ClassVar[type]

    @abstractmethod
    def roles(self, config: Any) -> tuple[RoleNeed, ...]:
        """Roles that this configuration calls; any other role is an error in the file."""

    def capabilities(self, config: Any) -> tuple[str, ...]:
        """Capabilities that this configuration needs of the adapter."""
        return ()

    def needs_negative(self, config: Any) -> bool:
        """Whether a step calls a model with guidance, so that a negative condition must exist."""
        return False

    @abstractmethod
    def updates(self, config: Any, iteration: int) -> tuple[str, ...]:
        """Roles whose optimizers step in ``iteration`` (1-based): horizons and plans need it."""

    def update_share(self, config: Any, role: str, low: float, high: float) -> float:
        """The share of ``role``'s updates that are made at t in [low, high) (1000 is in the last
        range): how often one of its experts can be expected to step. 1 without a better answer:
        a schedule is then as long as if that expert took all of the role's steps."""
        return 1.0

    def trajectory_times(self, config: Any) -> tuple[float, ...]:
        """Levels t of a teacher's trajectory that every batch must hold (``Batch.trajectory``, in
        this order); empty: none is read."""
        return ()

    def sampler(self, config: Any) -> SamplerSpec | None:
        """How the student is sampled."""
        return None

    def faults(self, config: Any, run: PlannedRun) -> Iterable[tuple[str, str]]:
        """Rules between the method's options and the run's models: pairs of a key of
        ``method_config`` and a message."""
        return ()

    @abstractmethod
    def build(
        self,
        config: Any,
        *,
        bundle: ModelBundle,
        adapter: DistillAdapter,
        conditioning: ConditioningProvider,
        streams: RandomStreams,
    ) -> DistillMethod[Any]:
        """The method itself."""


class FamilyPlugin(ABC):
    """A model family, as the app sees it before torch is imported."""

    name: ClassVar[str]
    help: ClassVar[str]
    config_class: ClassVar[type]

    @abstractmethod
    def capabilities(self, config: Any) -> Capabilities:
        """What the adapter will support."""

    @abstractmethod
    def faults(self, role: RoleSpec, config: Any) -> Sequence[str]:
        """What is wrong with a role's path, without reading weights: missing folder, file ..."""

    def config_faults(self, config: Any, roles: Collection[str]) -> Iterable[tuple[str, str]]:
        """What in ``config`` does not go with a run of these roles: pairs of its key and a
        message."""
        return ()

    def lora_faults(self, role: RoleSpec) -> Iterable[tuple[str, str]]:
        """What is wrong with a role's ``lora``: pairs of a key in it and a message."""
        if role.lora is not None:
            yield "rank", f"family {self.name!r} has no low-rank adapters; leave lora out"

    def head_faults(self, role: RoleSpec, config: Any) -> Iterable[tuple[str, str]]:
        """What is wrong with a role's ``heads``: pairs of a key in it and a message."""
        if role.heads is not None:
            yield "on", f"family {self.name!r} gives no features to a discriminator; leave it out"

    def fit_faults(self, role: RoleSpec, path: str) -> Iterable[str]:
        """Why weights of the model at ``path`` are not for the role's, where names and shapes
        would not show it. Reads no weights."""
        return ()

    def latent_shape(self, config: Any, *, source: str) -> tuple[int, int, int, int] | None:
        """(C, T, H, W) of the run's latents; None where it cannot be told without weights."""
        return None

    def text_shape(self, config: Any, *, source: str) -> tuple[int, int] | None:
        """(L, D) of the text embeddings that the model of ``source`` (a role's path) reads.

        None where it cannot be told without weights, or any length will do.
        """
        return None

    def image_shapes(self, config: Any, *, source: str) -> Mapping[str, tuple[int, ...]]:
        """Shapes of one row of the condition tensors that the model of ``source`` (a role's path)
        cannot do without beside the text: what it reads of a picture, by name."""
        return EMPTY

    def expert_ranges(self, role: RoleSpec, config: Any) -> Mapping[str, tuple[float, float]]:
        """By module, the t [low, high) that its calls have; empty for a role of one module.

        The last range holds its upper end, 1000, as well. Needs no weights.
        """
        return EMPTY

    @abstractmethod
    def plan(self, role: RoleSpec, config: Any) -> RolePlan:
        """The role's modules and sizes, from the meta device; needs no weights."""

    def plan_call(
        self,
        role: RoleSpec,
        config: Any,
        *,
        source: str,
        batch: int,
        guided: bool = False,
        judges: bool = False,
    ) -> CallPlan | None:
        """What one call of the role takes beside its weights; None: this family cannot tell.

        Args:
            role: its ``fsdp`` only where the role is really sharded.
            source: as in ``adapter``.
            batch: clips a call.
            guided: whether it is a call with guidance.
            judges: whether it is differentiated by its latents, though the role does not learn: it
                gives features to a discriminator.
        """
        return None

    @abstractmethod
    def load(
        self,
        roles: Sequence[RoleSpec],
        config: Any,
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
        shard: Callable[[RoleHandle], None] = lambda role: None,
    ) -> ModelBundle:
        """All roles with their weights.

        Args:
            shard: called with each role while its parameters are still on the meta device (buffers
                are real); it may put DTensors in their place, also on meta. Of those the family
                fills this process's own part, reading no more than that where a source can.
            seed: the run's; what starts at random (LoRA, heads) is a function of it and of its
                name.
            weights: by role and module, to take instead of those of the role's path. For a role
                with ``lora`` they may be whole weights (the base then) or adapters alone (beside
                the base of its path).

        Raises:
            WeightsError: a file or key is missing, unexpected or damaged (with the names).
        """

    @abstractmethod
    def weights(self, path: str) -> Mapping[str, WeightSource]:
        """The weights of a model folder or hub id, by module, to warm-start a role from.

        Raises:
            WeightsError: there are none, or they are damaged.
        """

    @abstractmethod
    def adapter(self, bundle: ModelBundle, config: Any, *, source: str) -> DistillAdapter:
        """The adapter; ``source`` is the folder or hub id of VAE, text encoder and tokenizer."""

    @abstractmethod
    def exporter(self, config: Any, *, source: str) -> Exporter:
        """Writes a role where others can read it; ``source`` as in ``adapter``."""

    def foreign_names(self) -> ForeignNames:
        """What the weights are called in other codes, to migrate their checkpoints.

        Raises:
            PluginError: this family knows none.
        """
        raise PluginError(
            f"family {self.name!r} knows no other code's names of its weights, so their "
            "checkpoints cannot be migrated. Convert them to its own format with that code"
        )

    def export_faults(self, role: RoleSpec, request: ExportRequest) -> Iterable[tuple[str, str]]:
        """What of ``request`` cannot be had for ``role``: pairs of its key and a message."""
        return ()


@frozen(eq=False, kw_only=True)
class RunParts:
    """What a callback plugin may build upon."""

    method: DistillMethod[Any]
    adapter: DistillAdapter
    conditioning: ConditioningProvider
    exporter: Exporter
    output_dir: Path


@frozen(kw_only=True)
class PlannedRun:
    """A run as it stands in its file: what rules of methods and callbacks may look at, without
    torch.

    Attributes:
        roles: by name.
        unread: names of roles that stand in the file, but have faults of their own.
        averaged: roles of which some callback keeps an average.
        student_sampler: the method's own, where it states one.
        has_negative: whether there will be a negative condition.
        experts: names of the roles that have more than one expert; None: not known.
        pictured: names of the roles that cannot be called without a first frame, and get none.
    """

    roles: Mapping[str, RoleSpec]
    unread: frozenset[str] = frozenset()
    averaged: frozenset[str] = frozenset()
    student_sampler: SamplerSpec | None = None
    has_negative: bool = True
    experts: frozenset[str] | None = None
    pictured: frozenset[str] = frozenset()

    @property
    def single(self) -> frozenset[str]:
        """Names of the roles that have one expert; none where it is not known."""
        return frozenset() if self.experts is None else frozenset(self.roles) - self.experts

    def role_faults(self, role: str, *, ema: bool = False) -> Iterator[tuple[str, str]]:
        """What is wrong with naming ``role`` (and its average): pairs of key and message."""
        if role in self.unread:
            return
        if role not in self.roles:
            has = ", ".join(self.roles) or "none"
            yield "role", f"there is no role {role!r} (this run has: {has})"
        elif ema and role not in self.averaged:
            kept = ", ".join(sorted(self.averaged)) or "no callback keeps one"
            yield (
                "ema",
                f"no average of {role!r} is kept; add it to callbacks.ema.roles ({kept}), or use "
                "ema: false",
            )

    def sampler_faults(
        self, sampler: SamplerSpec | None, role: str | None = None
    ) -> Iterator[tuple[str, str]]:
        """What is wrong with sampling so, and with sampling ``role`` so."""
        spec = sampler or self.student_sampler
        if spec is None:
            yield "sampler", "missing, and the method states no way to sample its student"
            return
        if role in self.roles and self.roles[role].heads is not None:
            yield "role", f"{role!r} is a discriminator, which makes no clips. Name another role"
        if role in self.pictured:
            yield (
                "role",
                f"{role!r} is an image-to-video model, and prompts alone bring no first frame to "
                "sample it from. In validation, name one a prompt (validation.images); elsewhere "
                "leave this out, and look at the export through its own pipeline",
            )
        if spec.guidance_2 is not None and role in self.single:
            yield (
                "sampler.guidance_2",
                f"{spec.guidance_2:g} is of a second expert, and {role!r} has one, which would "
                "never have it. Leave it out",
            )
        if spec.guided and not self.has_negative:
            w = next(w for w in spec.guidances if w != 1)
            yield (
                "sampler.guidance",
                f"{w:g} needs a negative condition, u + w (c - u), and there is none; "
                "write conditioning.negative_prompt, or use guidance: 1",
            )


class CallbackPlugin(ABC):
    """A callback, as the app sees it before torch is imported."""

    name: ClassVar[str]
    help: ClassVar[str]
    config_class: ClassVar[type]

    def averages(self, config: Any) -> tuple[str, ...]:
        """Roles of which this callback keeps an average of the weights."""
        return ()

    def metrics(self, config: Any) -> Mapping[str, int]:
        """Names of metrics that this callback measures, with the interval in iterations.

        It puts them into ``RunState.metrics`` in ``on_step_end``. Empty where they cannot be told
        because something that it reads is missing: ``faults`` says so.
        """
        return {}

    def faults(self, config: Any, run: PlannedRun) -> Iterable[tuple[str, str]]:
        """Rules across sections: pairs of a key under this callback and a message."""
        return ()

    @abstractmethod
    def build(self, config: Any, parts: RunParts) -> Callback:
        """The callback itself."""


_BASES: Mapping[str, type] = {
    "distill.families": FamilyPlugin,
    "distill.methods": MethodPlugin,
    "distill.callbacks": CallbackPlugin,
}


def plugin_names(group: Group) -> tuple[str, ...]:
    """Names of everything installed in ``group``, sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


def load_plugin(group: Group, name: str) -> Any:
    """The plugin called ``name``.

    Raises:
        PluginError: none of that name (with the known ones and the nearest), it does not
            import, or it is not a plugin of this kind.
    """
    found = [entry for entry in entry_points(group=group) if entry.name == name]
    kind = {"distill.families": "family", "distill.methods": "method"}.get(group, "callback")
    if not found:
        known = plugin_names(group)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PluginError(
            f"unknown {kind} {name!r}{hint} (installed: {', '.join(known) or 'none'})"
        )
    targets = sorted({entry.value for entry in found})
    if len(targets) > 1:
        raise PluginError(
            f"{kind} {name!r} is offered twice, by {' and '.join(targets)}; a name must mean one "
            "thing. Uninstall one of the packages."
        )
    try:
        plugin = found[0].load()
    except Exception as error:
        raise PluginError(
            f"{kind} {name!r} ({targets[0]}) does not import: {error}. The package that offers it "
            "is installed but broken; reinstall it."
        ) from error
    if not isinstance(plugin, _BASES[group]):
        raise PluginError(
            f"{kind} {name!r} ({targets[0]}) is a {type(plugin).__name__}, not an instance of "
            f"{_BASES[group].__name__}; the entry point must name one."
        )
    return plugin
