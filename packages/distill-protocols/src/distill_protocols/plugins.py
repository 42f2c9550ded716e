"""Plugins: families, methods, callbacks, trackers and metrics, found through entry points.

An entry point in the group ``distill.families``, ``distill.methods``, ``distill.callbacks``,
``distill.trackers`` or ``distill.metrics`` names an *instance* of a plugin class below, in a module
that imports no torch: a wrong run file is answered before anything heavy is imported. Heavy imports
belong inside ``build``, ``load`` and the like. ``distill_runtime.load_plugin`` looks plugins up.

Every plugin states the contract that it was built for (``contract = 2``): one that was built for
another is refused by name, and not at the first call that has changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, Never, Protocol, TypeVar

from attrs import evolve, frozen

from distill_protocols.capabilities import Capabilities
from distill_protocols.causal import Chunk
from distill_protocols.errors import PluginError
from distill_protocols.exports import ExportRequest, ForeignNames
from distill_protocols.fingerprint import Fingerprint
from distill_protocols.given_frames import FrameConditions
from distill_protocols.method_config import MethodConfig
from distill_protocols.metrics import Metric, MetricInput, MetricInputs, MetricNumber, MetricParts
from distill_protocols.planned_run import PlannedRun
from distill_protocols.problems import Problem
from distill_protocols.roles import RoleSpec

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from distill_protocols.adapter import DistillAdapter
    from distill_protocols.batch import Batch, ConditioningProvider
    from distill_protocols.bundle import ModelBundle, RoleHandle
    from distill_protocols.callbacks import Callback, Tracker
    from distill_protocols.exports import Exporter
    from distill_protocols.method import TrainableMethod
    from distill_protocols.plans import CallPlan, RolePlan
    from distill_protocols.random import RandomStreams
    from distill_protocols.weights import WeightSource

CONTRACT_VERSION = 2
"""Raised with every change of this package after which plugins must be adapted."""

EMPTY: Mapping[str, Never] = MappingProxyType({})

Group = Literal[
    "distill.families",
    "distill.methods",
    "distill.callbacks",
    "distill.trackers",
    "distill.metrics",
]

ConfigT = TypeVar("ConfigT")
MethodConfigT = TypeVar("MethodConfigT", bound=MethodConfig)


class Plugin(Protocol):
    """What all plugins have."""

    @property
    def name(self) -> str:
        """As run files and entry points call it."""
        ...

    @property
    def help(self) -> str:
        """A line for ``--plugins``."""
        ...

    @property
    def contract(self) -> int:
        """The ``CONTRACT_VERSION`` that it was built for."""
        ...


@frozen(kw_only=True)
class CaptionTokens:
    """What a tokenizer makes of captions.

    Attributes:
        counts: tokens of each caption, uncut.
        unknown: tokens of each that stand for words which the tokenizer does not know.
        limit: tokens that the encoder reads; what is behind them has no effect.
    """

    counts: tuple[int, ...]
    unknown: tuple[int, ...]
    limit: int


@frozen(kw_only=True)
class MethodPlugin(Generic[MethodConfigT]):
    """An algorithm: its config class, which states everything of it without torch, and where the
    method is.

    Attributes:
        config_class: of ``method_config``.
        implementation: ``module:Class``, imported when it is built. The class is called as
            ``Class(bundle, adapter, config, conditioning=..., streams=...)``.
    """

    name: str
    help: str
    config_class: type[MethodConfigT]
    implementation: str
    contract: int

    def build(
        self,
        config: MethodConfigT,
        *,
        bundle: ModelBundle,
        adapter: DistillAdapter,
        conditioning: ConditioningProvider,
        streams: RandomStreams,
    ) -> TrainableMethod:
        """Return the method itself."""
        module, name = self.implementation.split(":")
        method_class = vars(import_module(module))[name]
        return method_class(bundle, adapter, config, conditioning=conditioning, streams=streams)


class FamilyPlugin(ABC, Generic[ConfigT]):
    """A model family, as the app sees it before torch is imported.

    ``source`` is, everywhere, the folder or hub id of VAE, encoders and tokenizers: what
    ``components`` names, or else the path of the run's first role.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    contract: ClassVar[int]
    config_class: ClassVar[type]

    # -- what it can do -----------------------------------------------------------------------

    @abstractmethod
    def capabilities(self, config: ConfigT) -> Capabilities:
        """What the adapter will support."""

    def role_options(self, config: ConfigT) -> Collection[str]:
        """Return names of the ``RoleOptions`` that the family honours; a run that sets another is
        refused. ``precision`` is honoured by every family."""
        return ()

    def attention_backends(self, role: RoleSpec, config: ConfigT) -> Collection[str]:
        """Return names that ``RoleOptions.attention_backend`` may have for ``role``; asked for only
        where ``role_options`` has it."""
        return ()

    def export_formats(self) -> Mapping[str, str]:
        """Return names of the formats that its exporter writes, each with a line of help."""
        return EMPTY

    # -- what is wrong with a run -------------------------------------------------------------

    @abstractmethod
    def role_problems(self, role: RoleSpec, config: ConfigT) -> Iterable[Problem]:
        """What is wrong with a role: its path (missing folder, file ...), its ``lora``, its
        ``heads``. Paths are keys of the role. Reads no weights."""

    def config_problems(self, config: ConfigT, roles: Collection[str]) -> Iterable[Problem]:
        """What in ``config`` does not go with a run of these roles; paths are its keys."""
        return ()

    def weights_problems(self, role: RoleSpec, path: str) -> Iterable[str]:
        """Why weights of the model at ``path`` are not for the role's, where names and shapes
        would not show it. Reads no weights."""
        return ()

    def start_problems(self, role: RoleSpec, config: ConfigT, path: str) -> Iterable[str]:
        """What is wrong with ``path`` as the weights that ``role`` starts with, instead of those of
        its own path. By default it must be what a path of a role may be, of the same model."""
        spec = evolve(role, path=path, lora=None)
        yield from (problem.message for problem in self.role_problems(spec, config))
        yield from self.weights_problems(role, path)

    def starts_with_adapters(self, path: str) -> bool:
        """Return whether ``path`` holds a LoRA: a role that is one may start with it, or a whole
        one with it merged into the weights of its own path."""
        return False

    def start_weights(self, role: RoleSpec, path: str) -> Mapping[str, WeightSource]:
        """Return the weights that ``role`` starts with, by module: see ``start_problems``.

        Raises:
            WeightsError: there are none, or they are damaged.
        """
        return self.weights(path)

    def export_problems(self, role: RoleSpec, request: ExportRequest) -> Iterable[Problem]:
        """What of ``request`` cannot be had for ``role``; paths are keys of the request."""
        return ()

    def export_warnings(
        self, role: RoleSpec, config: ConfigT, request: ExportRequest, *, source: str
    ) -> Iterable[str]:
        """Where tools that read the export will not do what the run does; a person should know
        before training. Reads no weights, and may import torch."""
        return ()

    # -- shapes and numbers, without weights --------------------------------------------------

    def components(self, config: ConfigT) -> str | None:
        """Folder or hub id of VAE, encoders and tokenizers; None: the path of the first role."""
        return None

    def latent_shape(self, config: ConfigT, *, source: str) -> tuple[int, int, int, int] | None:
        """(C, T, H, W) of the run's latents; None where that is unknown without weights."""
        return None

    def part_shapes(
        self, config: ConfigT, latents: tuple[int, int, int, int], *, source: str
    ) -> Mapping[str, tuple[int, int, int, int]]:
        """Shapes of all parts of a clip whose main part has the shape ``latents``, it first; empty:
        latents are one tensor."""
        return EMPTY

    def latent_tokens(self, config: ConfigT, *, source: str) -> int | None:
        """Tokens that the model makes of one clip, which a dynamic shift depends on; None where
        that is unknown, or nothing depends on it."""
        return None

    def chunks(self, role: RoleSpec, config: ConfigT, frames: int) -> tuple[Chunk, ...]:
        """How ``role`` divides a video of ``frames`` latent frames (``CausalRollout.chunks``). By
        default it makes all of it at once."""
        return (Chunk(0, frames),)

    def clip_shapes(self, config: ConfigT) -> tuple[tuple[int, int, int], ...]:
        """(frames, height, width) in pixels of the clips that latents are made of; empty: this
        family does not know, and data for it are not made from clips."""
        return ()

    def config_of_clip(self, config: ConfigT, clip: tuple[int, int, int]) -> ConfigT:
        """``config`` of a run whose clips all have one of its ``clip_shapes``; by default they do.
        What is asked of ``config`` itself is meant of the largest."""
        return config

    def frame_rate(self, config: ConfigT, *, source: str) -> float | None:
        """Frames a second of the clips that the model at ``source`` was trained on; None where
        that is unknown."""
        return None

    def count_tokens(
        self, config: ConfigT, captions: Sequence[str], *, source: str
    ) -> CaptionTokens | None:
        """What the tokenizer makes of captions; None: this family does not know, or it is not on
        this machine. May import torch."""
        return None

    def condition_shapes(self, config: ConfigT, *, source: str) -> Mapping[str, tuple[int, ...]]:
        """By name, the shape of one row of every condition tensor that the model of ``source`` (a
        role's path) cannot do without: text, masks, pooled embeddings, image parts.

        A data set must hold them. Left out are those whose shape is unknown without weights, and
        those that may have any shape.
        """
        return EMPTY

    def fingerprint(self, config: ConfigT, *, source: str) -> Fingerprint:
        """What computes latents and conditions: the ``latent_fingerprint`` and the
        ``condition_fingerprint`` of the adapter, from files alone. A data set is compared with it
        before anything is loaded; empty: this family does not know, and nothing is compared."""
        return EMPTY

    def frame_conditions(self, role: RoleSpec, config: ConfigT) -> FrameConditions:
        """Return which frames of a clip the role's model can be given.

        By default a first frame where ``capabilities`` state that conditions may hold one.
        """
        if self.needs_image(role, config):
            return FrameConditions(first="always")
        is_read = self.capabilities(config).supports_image_condition
        return FrameConditions(first="optional" if is_read else "never")

    def needs_image(self, role: RoleSpec, config: ConfigT) -> bool:
        """Return whether the role cannot be called without a first frame in its condition.

        A family that overrides ``frame_conditions`` says it there.
        """
        return False

    def expert_ranges(self, role: RoleSpec, config: ConfigT) -> Mapping[str, tuple[float, float]]:
        """By module of the role, the t [low, high) that its calls have; empty for a model of one
        module that can be called at every t. Of ``role.experts`` only these.

        A range that ends at 1000 holds its upper end as well. Needs no weights. A model of one
        module that knows some t alone (a variance-preserving one) has one range.
        """
        return EMPTY

    @abstractmethod
    def plan(self, role: RoleSpec, config: ConfigT) -> RolePlan:
        """Return the role's modules and sizes, from the meta device; needs no weights."""

    def plan_call(
        self,
        role: RoleSpec,
        config: ConfigT,
        *,
        source: str,
        batch: int,
        guided: bool = False,
        input_gradient: bool = False,
    ) -> CallPlan | None:
        """What one call of the role takes beside its weights; None: this family cannot estimate it.

        Args:
            role: its ``fsdp`` only where the role is really sharded.
            batch: clips a call.
            guided: whether it is a call with guidance.
            input_gradient: whether it is differentiated by its latents, though the role does not
                train: a discriminator reads its features.
        """
        return None

    # -- parts of a run -----------------------------------------------------------------------

    @abstractmethod
    def load(
        self,
        roles: Sequence[RoleSpec],
        config: ConfigT,
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
        shard: Callable[[RoleHandle], None] = lambda role: None,
    ) -> ModelBundle:
        """Return all roles with their weights.

        Args:
            shard: called with each role while its parameters are still on the meta device (buffers
                are real); it may put DTensors in their place, also on meta. Of those the family
                fills this process's own part, reading no more than that where a source can.
            seed: the run's; what starts at random (LoRA, discriminators) is a function of it and
                of its name.
            weights: by role and module, to take instead of those of the role's path. For a role
                with ``lora`` they may be whole weights (the base then) or adapters alone (beside
                the base of its path).

        Raises:
            WeightsError: a file or key is missing, unexpected or damaged (with the names).
        """

    @abstractmethod
    def weights(self, path: str) -> Mapping[str, WeightSource]:
        """Return the weights of a model folder or hub id, by module, to warm-start a role from.

        Raises:
            WeightsError: there are none, or they are damaged.
        """

    @abstractmethod
    def adapter(self, bundle: ModelBundle, config: ConfigT, *, source: str) -> DistillAdapter:
        """How its models are called."""

    @abstractmethod
    def exporter(self, config: ConfigT, *, source: str) -> Exporter:
        """Writes a role where others can read it; not asked for where ``export_formats`` has
        none."""

    def foreign_names(self) -> ForeignNames:
        """What the weights are called in other codes, to migrate their checkpoints.

        Raises:
            PluginError: this family knows none.
        """
        raise PluginError(
            f"family {self.name!r} knows no other code's names of its weights, so their "
            "checkpoints cannot be migrated. Convert them to its own format with that code"
        )

    def foreign_conditions(self, config: ConfigT, *, source: str) -> Mapping[str, str]:
        """Which condition tensor each tensor of FastVideo's preprocessed samples is, by its name
        there (``text_embedding``, ``first_frame_latent``, ``clip_feature``).

        Such samples are taken where all of ``condition_shapes`` are among them. The default is for
        models that read one text [L, D] and nothing else.
        """
        shapes = self.condition_shapes(config, source=source)
        texts = [name for name, shape in shapes.items() if len(shape) == 2]
        return {"text_embedding": texts[0]} if len(texts) == 1 else EMPTY


@frozen(eq=False, kw_only=True)
class RunParts:
    """What a callback plugin may build upon.

    Attributes:
        exporter: of the family; None: it writes no format.
        method_config: what the method declares of itself; None: it was built without one.
        examples: returns samples of the run's data, by their number: the same ones each time and on
            all ranks, without dropout, read beside the loader. None: there is no data set.
        micro_batch: samples that one process takes at once in training, and so as many as are known
            to fit.
    """

    method: TrainableMethod
    adapter: DistillAdapter
    conditioning: ConditioningProvider
    exporter: Exporter | None
    output_dir: Path
    method_config: MethodConfig | None = None
    examples: Callable[[int], Batch] | None = None
    micro_batch: int = 1


class CallbackPlugin(ABC, Generic[ConfigT]):
    """A callback, as the app sees it before torch is imported."""

    name: ClassVar[str]
    help: ClassVar[str]
    contract: ClassVar[int]
    config_class: ClassVar[type]
    on_by_default: ClassVar[bool] = False
    """Whether a run whose file does not name the callback has it all the same, with the defaults
    of ``config_class``, which then must not have a field without one. A file turns it off by
    ``null`` in place of its options. For callbacks that only observe (``Callback.only_observes``):
    whoever installs the package gets them, in runs that are under way too."""
    shows_results: ClassVar[bool] = False
    """Whether the callback shows what the others leave behind, and is therefore called after all
    of them, validation included."""

    def averages(self, config: ConfigT) -> tuple[str, ...]:
        """Roles of which this callback keeps an average of the weights."""
        return ()

    def metrics(self, config: ConfigT) -> Mapping[str, int]:
        """Return names of metrics that this callback measures, with the interval in iterations.

        It puts them into ``RunState.metrics`` in ``on_step_end``. Empty where they are unknown
        because something that it reads is missing: ``problems`` reports that.
        """
        return EMPTY

    def problems(self, config: ConfigT, run: PlannedRun) -> Iterable[Problem]:
        """Rules across sections; paths are keys of this callback."""
        return ()

    @abstractmethod
    def build(self, config: ConfigT, parts: RunParts) -> Callback:
        """Return the callback itself."""


class TrackerPlugin(ABC):
    """A tracker, as the app sees it before torch is imported."""

    name: ClassVar[str]
    help: ClassVar[str]
    contract: ClassVar[int]

    def problems(self) -> Iterable[Problem]:
        """What it needs and does not have on this machine, such as a package; paths are empty."""
        return ()

    @abstractmethod
    def build(self, output_dir: Path) -> Tracker:
        """Return the tracker itself, which writes into ``output_dir`` or elsewhere.

        Raises:
            ConfigError: something that it needs is not installed.
        """


class MetricPlugin(ABC, Generic[ConfigT]):
    """A metric of reports, as the app sees it before torch is imported."""

    name: ClassVar[str]
    help: ClassVar[str]
    contract: ClassVar[int]
    config_class: ClassVar[type]
    measures_real: ClassVar[bool] = False
    """Whether it can be measured of real clips, whose captions are not known: what they come to is
    reported beside the entries."""

    def needs(self, config: ConfigT) -> Collection[MetricInput]:
        """Return what a report must have to measure this. A report of which nothing else is said
        measures what it has the needs of; one that names a metric must have them."""
        return ()

    @abstractmethod
    def numbers(self, config: ConfigT, inputs: MetricInputs) -> Mapping[str, MetricNumber]:
        """Return the names of its numbers, short ones: checkpoints are kept by
        ``report/<entry>/<name>``. Called only with what it ``needs``; empty where they are unknown
        because a file cannot be read: ``problems`` reports that."""

    def problems(self, config: ConfigT, inputs: MetricInputs) -> Iterable[Problem]:
        """What is wrong with its own options; paths are keys of its config."""
        return ()

    def input_problems(self, config: ConfigT, inputs: MetricInputs) -> Iterable[Problem]:
        """Why it cannot measure what the report has; paths are names of ``MetricInputs``."""
        return ()

    @abstractmethod
    def build(self, config: ConfigT, parts: MetricParts) -> Metric:
        """Return the metric itself, with all that it reads.

        Raises:
            WeightsError, DataError: something that it reads is missing or damaged.
        """
