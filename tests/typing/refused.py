"""What the type checker must refuse, each on the line that ends with ``expect-error``.

If one of these passed, ``pairs.py`` would prove nothing. Nothing runs this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from attrs import frozen
from distill_adapters_wan import WanAdapter
from distill_methods import DMD2Config, DMD2Method, LaddConfig, LatentDiffusion
from distill_methods.latent_config import LatentMethodConfig
from distill_methods.plugins import dmd2
from distill_methods.teachers.config import TeachersConfig
from distill_protocols import (
    CallbackPlugin,
    Capabilities,
    Chunk,
    Condition,
    ConditionEncoder,
    ConditioningProvider,
    Denoiser,
    Discriminating,
    DistillAdapter,
    ExitConditioning,
    ExpertRouting,
    ImageConditioning,
    LatentCodec,
    MethodConfig,
    MethodPlugin,
    ModelBundle,
    NoiseSchedule,
    OptionalContracts,
    Plugin,
    RandomStreams,
    RoleNeed,
    RunParts,
    Sampler,
    SamplerSpec,
    Tangents,
    TrainableMethod,
)
from torch import Tensor


class WithoutSample(
    NoiseSchedule, Denoiser, LatentCodec, ConditionEncoder, OptionalContracts, Protocol
):
    """Everything but ``Sampler``."""


class NoChunks(Protocol):
    """A causal contract that cannot divide a video."""

    def clear_caches(self, role: str, *, stream: str | None = None) -> None: ...


class CausalWithoutChunks(
    NoiseSchedule, Denoiser, LatentCodec, ConditionEncoder, Sampler, Protocol
):
    """Everything, but ``causal`` is something else."""

    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def causal(self) -> NoChunks | None: ...
    @property
    def experts(self) -> ExpertRouting | None: ...
    @property
    def images(self) -> ImageConditioning | None: ...
    @property
    def discriminators(self) -> Discriminating | None: ...
    @property
    def tangents(self) -> Tangents | None: ...
    @property
    def exits(self) -> ExitConditioning | None: ...


class ForwardWithoutFeatures(
    NoiseSchedule, LatentCodec, ConditionEncoder, Sampler, OptionalContracts, Protocol
):
    """Everything, but a model call that takes less."""

    def forward(self, role: str, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor: ...


class WrongCausal(WanAdapter):
    """A family that builds on a shipped adapter is held to the contract as well."""

    @property
    def causal(self) -> NoChunks | None:  # expect-error
        return None


def adapters(
    without_sample: WithoutSample,
    causal_without_chunks: CausalWithoutChunks,
    forward_without_features: ForwardWithoutFeatures,
) -> list[DistillAdapter]:
    some_class: type[DistillAdapter] = dict  # expect-error
    wrong_causal: type[DistillAdapter] = WrongCausal  # expect-error
    assert some_class is not wrong_causal
    accepted: list[DistillAdapter] = []
    accepted.append(without_sample)  # expect-error
    accepted.append(causal_without_chunks)  # expect-error
    accepted.append(forward_without_features)  # expect-error
    return accepted


def methods(
    bundle: ModelBundle,
    adapter: LatentDiffusion,
    without_sample: WithoutSample,
    conditioning: ConditioningProvider,
) -> list[TrainableMethod]:
    a = DMD2Method(bundle, without_sample, DMD2Config(), conditioning=conditioning)  # expect-error
    b = DMD2Method(bundle, adapter, LaddConfig(), conditioning=conditioning)  # expect-error
    c = DMD2Method(bundle, adapter, DMD2Config())  # expect-error
    return [a, b, c]


def optional_contracts(adapter: DistillAdapter, video: Tensor) -> tuple[Chunk, ...]:
    adapter.chunks("student")  # expect-error
    adapter.discriminators.discriminate("discriminator", {0: video})  # expect-error
    return adapter.causal.chunks("student")  # expect-error


# -- configs --------------------------------------------------------------------------------------


@frozen(kw_only=True)
class WithoutRoles(LatentMethodConfig):
    """A description that leaves out whom the method calls."""


@frozen(kw_only=True)
class WithoutTurns(MethodConfig):
    """A description on the base itself that leaves out who is updated when."""

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        return ()


@frozen(kw_only=True)
class WithoutGuidance(TeachersConfig):
    """Teachers, and no word on how they are guided."""

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        return self.teacher_roles


def configs() -> tuple[MethodConfig, ...]:
    sampler = SamplerSpec(steps=1)
    without_roles = WithoutRoles(student_sampler=sampler)  # expect-error
    without_guidance = WithoutGuidance(student_sampler=sampler)  # expect-error
    without_turns = WithoutTurns()  # expect-error
    return without_roles, without_guidance, without_turns


# -- plugins --------------------------------------------------------------------------------------


class WithoutContract:
    """It does not state the contract that it was built for."""

    name = "x"
    help = "x"


class BuildsAnInt(MethodPlugin[DMD2Config]):
    """Its method is no method."""

    def build(  # expect-error
        self,
        config: DMD2Config,
        *,
        bundle: ModelBundle,
        adapter: DistillAdapter,
        conditioning: ConditioningProvider,
        streams: RandomStreams,
    ) -> int:
        return 0


class BuildsADict(CallbackPlugin[DMD2Config]):
    """Its callback is no callback."""

    name: ClassVar[str] = "x"
    help: ClassVar[str] = "x"
    contract: ClassVar[int] = 2
    config_class: ClassVar[type] = DMD2Config

    def build(self, config: DMD2Config, parts: RunParts) -> Mapping[str, int]:  # expect-error
        return {}


def plugins(
    bundle: ModelBundle, adapter: DistillAdapter, conditioning: ConditioningProvider
) -> list[Plugin]:
    streams = RandomStreams(0)
    dmd2.build(
        LaddConfig(),  # expect-error
        bundle=bundle,
        adapter=adapter,
        conditioning=conditioning,
        streams=streams,
    )
    no_config = MethodPlugin(
        name="x",
        help="x",
        config_class=int,  # expect-error
        implementation="x:X",
        contract=2,
    )
    accepted: list[Plugin] = [no_config]
    accepted.append(WithoutContract())  # expect-error
    return accepted
