"""The methods as the app finds them (entry points ``distill.methods``). No torch here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from distill_protocols.plugins import MethodPlugin, RoleNeed
from distill_protocols.sampler import SamplerSpec

from distill_methods.dmd2.config import DMD2Config
from distill_methods.finetune.config import FinetuneConfig
from distill_methods.teacher_only.config import TeacherOnlyConfig

if TYPE_CHECKING:
    from distill_methods.latent_method import MethodConfig


class LatentMethodPlugin(MethodPlugin):
    """A method whose config says everything (``MethodConfig``), and where its class is."""

    implementation: ClassVar[str]
    """``module:class``, imported when it is built: only then is there torch."""

    def roles(self, config: MethodConfig) -> tuple[RoleNeed, ...]:
        return config.needs

    def capabilities(self, config: MethodConfig) -> tuple[str, ...]:
        return config.capabilities

    def needs_negative(self, config: MethodConfig) -> bool:
        return config.guided

    def updates(self, config: MethodConfig, iteration: int) -> tuple[str, ...]:
        return config.turns(iteration)

    def update_share(self, config: MethodConfig, role: str, low: float, high: float) -> float:
        return config.update_share(role, low, high)

    def sampler(self, config: MethodConfig) -> SamplerSpec:
        return config.student_sampler

    def build(self, config: MethodConfig, *, bundle: Any, adapter: Any, **parts: Any) -> Any:
        module, name = self.implementation.split(":")
        return vars(import_module(module))[name](bundle, adapter, config, **parts)


class DMD2Plugin(LatentMethodPlugin):
    name = "dmd2"
    help = "few-step student by distribution matching (student, teacher, critic)"
    config_class = DMD2Config
    implementation = "distill_methods.dmd2.method:DMD2Method"


class TeacherOnlyPlugin(LatentMethodPlugin):
    name = "teacher_only"
    help = "student learns the teacher's guided prediction (student, teacher)"
    config_class = TeacherOnlyConfig
    implementation = "distill_methods.teacher_only.method:TeacherOnlyMethod"


class FinetunePlugin(LatentMethodPlugin):
    name = "finetune"
    help = "flow matching on data (student)"
    config_class = FinetuneConfig
    implementation = "distill_methods.finetune.method:FinetuneMethod"


dmd2 = DMD2Plugin()
teacher_only = TeacherOnlyPlugin()
finetune = FinetunePlugin()
