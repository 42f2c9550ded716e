"""The methods as the app finds them (entry points ``distill.methods``). No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from distill_protocols.plugins import MethodPlugin, PlannedRun, RoleNeed
from distill_protocols.sampler import SamplerSpec

from distill_methods.causvid.config import CausVidConfig
from distill_methods.consistency.config import ConsistencyConfig
from distill_methods.dmd2.config import DMD2Config
from distill_methods.finetune.config import FinetuneConfig
from distill_methods.kd.config import KDConfig
from distill_methods.ladd.config import LaddConfig
from distill_methods.rcm.config import RCMConfig
from distill_methods.self_forcing.config import SelfForcingConfig
from distill_methods.teacher_only.config import TeacherOnlyConfig
from distill_methods.teachers import TeachersConfig

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

    def faults(self, config: MethodConfig, run: PlannedRun) -> Iterable[tuple[str, str]]:
        return config.faults(run) if isinstance(config, TeachersConfig) else ()

    def build(self, config: MethodConfig, *, bundle: Any, adapter: Any, **parts: Any) -> Any:
        module, name = self.implementation.split(":")
        return vars(import_module(module))[name](bundle, adapter, config, **parts)


class DMD2Plugin(LatentMethodPlugin):
    name = "dmd2"
    help = "few-step student by distribution matching (student, teacher, critic)"
    config_class = DMD2Config
    implementation = "distill_methods.dmd2.method:DMD2Method"


class LaddPlugin(LatentMethodPlugin):
    name = "ladd"
    help = "few-step student by a GAN on the teacher's features (student, teacher, discriminator)"
    config_class = LaddConfig
    implementation = "distill_methods.ladd.method:LaddMethod"


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


class ConsistencyPlugin(LatentMethodPlugin):
    name = "consistency"
    help = "few-step student of the teacher's trajectory (student, teacher)"
    config_class = ConsistencyConfig
    implementation = "distill_methods.consistency.method:ConsistencyMethod"


class RCMPlugin(LatentMethodPlugin):
    name = "rcm"
    help = "consistency and distribution matching together (student, teacher, critic)"
    config_class = RCMConfig
    implementation = "distill_methods.rcm.method:RCMMethod"


class SelfForcingPlugin(LatentMethodPlugin):
    name = "self_forcing"
    help = "causal student by distribution matching of its own rollouts (student, teacher, critic)"
    config_class = SelfForcingConfig
    implementation = "distill_methods.self_forcing.method:SelfForcingMethod"


class CausVidPlugin(LatentMethodPlugin):
    name = "causvid"
    help = "causal student by distribution matching on noised data (student, teacher, critic)"
    config_class = CausVidConfig
    implementation = "distill_methods.causvid.method:CausVidMethod"


class KDPlugin(LatentMethodPlugin):
    name = "kd"
    help = "student learns the ends of a teacher's stored trajectories (student)"
    config_class = KDConfig
    implementation = "distill_methods.kd.method:KDMethod"

    def trajectory_times(self, config: KDConfig) -> tuple[float, ...]:
        return config.times


dmd2 = DMD2Plugin()
ladd = LaddPlugin()
teacher_only = TeacherOnlyPlugin()
finetune = FinetunePlugin()
consistency = ConsistencyPlugin()
rcm = RCMPlugin()
self_forcing = SelfForcingPlugin()
causvid = CausVidPlugin()
kd = KDPlugin()
