"""Plugins: families, methods and callbacks, found through entry points.

An entry point in the group ``distill.families``, ``distill.methods`` or ``distill.callbacks``
names an *instance* of a plugin class below, in a module that imports no torch: a wrong run file
is answered before anything heavy is imported. Heavy imports belong inside ``build``, ``load`` ...
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import frozen

from distill_protocols.capabilities import Capabilities
from distill_protocols.errors import PluginError
from distill_protocols.sampler import SamplerSpec

if TYPE_CHECKING:
    import torch

    from distill_protocols.adapter import DistillAdapter, Exporter
    from distill_protocols.batch import ConditioningProvider
    from distill_protocols.bundle import ModelBundle, Precision, RolePlan
    from distill_protocols.callbacks import Callback
    from distill_protocols.method import DistillMethod
    from distill_protocols.random import RandomStreams

Group = Literal["distill.families", "distill.methods", "distill.callbacks"]


@frozen(kw_only=True)
class RoleNeed:
    """A role that a method calls, and whether it trains it."""

    name: str
    trainable: bool
    help: str = ""


@frozen(kw_only=True)
class RoleSpec:
    """Where one role comes from: what a family needs to load or plan it.

    Attributes:
        path: a Diffusers-format folder, absolute, or a hub id such as ``Wan-AI/...``.
    """

    name: str
    path: str
    trainable: bool
    precision: Precision = "fp32"
    fsdp: Mapping[str, Any] | None = None


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

    def sampler(self, config: Any) -> SamplerSpec | None:
        """How the student is sampled."""
        return None

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

    def latent_shape(self, config: Any, *, source: str) -> tuple[int, int, int, int] | None:
        """(C, T, H, W) of the run's latents; None where it cannot be told without weights."""
        return None

    def text_shape(self, config: Any, *, source: str) -> tuple[int, int] | None:
        """(L, D) of the text embeddings that the model of ``source`` (a role's path) reads.

        None where it cannot be told without weights, or any length will do.
        """
        return None

    @abstractmethod
    def plan(self, role: RoleSpec, config: Any) -> RolePlan:
        """The role's modules and sizes, from the meta device; needs no weights."""

    @abstractmethod
    def load(self, roles: Sequence[RoleSpec], config: Any, *, device: torch.device) -> ModelBundle:
        """All roles with their weights.

        Raises:
            WeightsError: a file or key is missing, unexpected or damaged (with the names).
        """

    @abstractmethod
    def adapter(self, bundle: ModelBundle, config: Any, *, source: str) -> DistillAdapter:
        """The adapter; ``source`` is the folder or hub id of VAE, text encoder and tokenizer."""

    @abstractmethod
    def exporter(self, bundle: ModelBundle, config: Any, *, source: str) -> Exporter:
        """Writes a role as a pipeline folder in the family's own public format."""


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
    """A run as it stands in its file: what a callback's rules may look at, without torch.

    Attributes:
        roles: by name.
        unread: names of roles that stand in the file, but have faults of their own.
        averaged: roles of which some callback keeps an average.
        student_sampler: the method's own, where it states one.
        has_negative: whether there will be a negative condition.
    """

    roles: Mapping[str, RoleSpec]
    unread: frozenset[str] = frozenset()
    averaged: frozenset[str] = frozenset()
    student_sampler: SamplerSpec | None = None
    has_negative: bool = True

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

    def sampler_faults(self, sampler: SamplerSpec | None) -> Iterator[tuple[str, str]]:
        """What is wrong with sampling so."""
        spec = sampler or self.student_sampler
        if spec is None:
            yield "sampler", "missing, and the method states no way to sample its student"
        elif spec.guidance != 1 and not self.has_negative:
            yield (
                "sampler.guidance",
                f"{spec.guidance:g} needs a negative condition, u + w (c - u), and there is none; "
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
