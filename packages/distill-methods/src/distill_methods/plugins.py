"""The methods as the app finds them (entry points ``distill.methods``). No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.plugins import MethodPlugin, RoleNeed
from distill_protocols.sampler import SamplerSpec

from distill_methods.dmd2.config import DMD2Config
from distill_methods.finetune.config import FinetuneConfig
from distill_methods.teacher_only.config import TeacherOnlyConfig
from distill_methods.time_ranges import share, share_of_levels

if TYPE_CHECKING:
    from distill_protocols.batch import ConditioningProvider
    from distill_protocols.bundle import ModelBundle
    from distill_protocols.random import RandomStreams

    from distill_methods.contracts import LatentDiffusion
    from distill_methods.dmd2.method import DMD2Method
    from distill_methods.finetune.method import FinetuneMethod
    from distill_methods.teacher_only.method import TeacherOnlyMethod

_STUDENT = RoleNeed(name="student", trainable=True, help="the model that learns")
_TEACHER = RoleNeed(name="teacher", trainable=False, help="the fixed model that is copied")
_CRITIC = RoleNeed(name="critic", trainable=True, help="follows the student's own clips")


class DMD2Plugin(MethodPlugin):
    """DMD2, see ``distill_methods.dmd2.method``."""

    name = "dmd2"
    help = "few-step student by distribution matching (student, teacher, critic)"
    config_class = DMD2Config

    def roles(self, config: DMD2Config) -> tuple[RoleNeed, ...]:
        return (_STUDENT, _TEACHER, _CRITIC)

    def capabilities(self, config: DMD2Config) -> tuple[str, ...]:
        return config.capabilities

    def needs_negative(self, config: DMD2Config) -> bool:
        return config.guided

    def updates(self, config: DMD2Config, iteration: int) -> tuple[str, ...]:
        return config.turns(iteration)

    def update_share(self, config: DMD2Config, role: str, low: float, high: float) -> float:
        if role == "student":
            levels = [1000 * sigma for sigma in config.student_sampler.sigmas()]
            return share_of_levels(levels, low, high)
        return share(config.critic_time or config.score_time, low, high)

    def sampler(self, config: DMD2Config) -> SamplerSpec:
        return config.student_sampler

    def build(
        self,
        config: DMD2Config,
        *,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        conditioning: ConditioningProvider,
        streams: RandomStreams,
    ) -> DMD2Method:
        from distill_methods.dmd2.method import DMD2Method

        return DMD2Method(bundle, adapter, config, conditioning=conditioning, streams=streams)


class TeacherOnlyPlugin(MethodPlugin):
    """Guidance distillation, see ``distill_methods.teacher_only.method``."""

    name = "teacher_only"
    help = "student learns the teacher's guided prediction (student, teacher)"
    config_class = TeacherOnlyConfig

    def roles(self, config: TeacherOnlyConfig) -> tuple[RoleNeed, ...]:
        return (_STUDENT, _TEACHER)

    def capabilities(self, config: TeacherOnlyConfig) -> tuple[str, ...]:
        return config.capabilities

    def needs_negative(self, config: TeacherOnlyConfig) -> bool:
        return config.guided

    def updates(self, config: TeacherOnlyConfig, iteration: int) -> tuple[str, ...]:
        return config.turns(iteration)

    def update_share(self, config: TeacherOnlyConfig, role: str, low: float, high: float) -> float:
        return share(config.time, low, high)

    def sampler(self, config: TeacherOnlyConfig) -> SamplerSpec:
        return config.student_sampler

    def build(
        self,
        config: TeacherOnlyConfig,
        *,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        conditioning: ConditioningProvider,
        streams: RandomStreams,
    ) -> TeacherOnlyMethod:
        from distill_methods.teacher_only.method import TeacherOnlyMethod

        return TeacherOnlyMethod(
            bundle, adapter, config, conditioning=conditioning, streams=streams
        )


class FinetunePlugin(MethodPlugin):
    """Flow matching on data, see ``distill_methods.finetune.method``."""

    name = "finetune"
    help = "flow matching on data (student)"
    config_class = FinetuneConfig

    def roles(self, config: FinetuneConfig) -> tuple[RoleNeed, ...]:
        return (_STUDENT,)

    def capabilities(self, config: FinetuneConfig) -> tuple[str, ...]:
        return config.capabilities

    def needs_negative(self, config: FinetuneConfig) -> bool:
        return config.guided

    def updates(self, config: FinetuneConfig, iteration: int) -> tuple[str, ...]:
        return config.turns(iteration)

    def update_share(self, config: FinetuneConfig, role: str, low: float, high: float) -> float:
        return share(config.time, low, high)

    def sampler(self, config: FinetuneConfig) -> SamplerSpec:
        return config.student_sampler

    def build(
        self,
        config: FinetuneConfig,
        *,
        bundle: ModelBundle,
        adapter: LatentDiffusion,
        conditioning: ConditioningProvider,
        streams: RandomStreams,
    ) -> FinetuneMethod:
        from distill_methods.finetune.method import FinetuneMethod

        return FinetuneMethod(bundle, adapter, config, conditioning=conditioning, streams=streams)


dmd2 = DMD2Plugin()
teacher_only = TeacherOnlyPlugin()
finetune = FinetunePlugin()
