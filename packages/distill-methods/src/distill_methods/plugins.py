"""The plugins of the methods (entry points ``distill.methods``). No torch here."""

from __future__ import annotations

from distill_protocols import MethodPlugin

from distill_methods.causal_consistency.config import CausalConsistencyConfig
from distill_methods.causvid.config import CausVidConfig
from distill_methods.consistency.config import ConsistencyConfig
from distill_methods.dmd2.config import DMD2Config
from distill_methods.finetune.config import FinetuneConfig
from distill_methods.flow_map.config import FlowMapConfig
from distill_methods.flow_map_dmd.config import FlowMapDMDConfig
from distill_methods.kd.config import KDConfig
from distill_methods.ladd.config import LaddConfig
from distill_methods.phased_dmd.config import PhasedDMDConfig
from distill_methods.rcm.config import RCMConfig
from distill_methods.self_forcing.config import SelfForcingConfig
from distill_methods.streaming_long_tuning.config import StreamingConfig
from distill_methods.teacher_only.config import TeacherOnlyConfig

dmd2 = MethodPlugin(
    name="dmd2",
    help="few-step student by distribution matching (student, teacher, critic)",
    config_class=DMD2Config,
    implementation="distill_methods.dmd2.method:DMD2Method",
    contract=2,
)
phased_dmd = MethodPlugin(
    name="phased_dmd",
    help="two experts, each matched in its own phase (student, teacher, critic)",
    config_class=PhasedDMDConfig,
    implementation="distill_methods.phased_dmd.method:PhasedDMDMethod",
    contract=2,
)
ladd = MethodPlugin(
    name="ladd",
    help="few-step student by a GAN on the teacher's features (student, teacher, discriminator)",
    config_class=LaddConfig,
    implementation="distill_methods.ladd.method:LaddMethod",
    contract=2,
)
teacher_only = MethodPlugin(
    name="teacher_only",
    help="student learns the teacher's guided prediction (student, teacher)",
    config_class=TeacherOnlyConfig,
    implementation="distill_methods.teacher_only.method:TeacherOnlyMethod",
    contract=2,
)
finetune = MethodPlugin(
    name="finetune",
    help="flow matching on data (student)",
    config_class=FinetuneConfig,
    implementation="distill_methods.finetune.method:FinetuneMethod",
    contract=2,
)
consistency = MethodPlugin(
    name="consistency",
    help="few-step student of the teacher's trajectory (student, teacher)",
    config_class=ConsistencyConfig,
    implementation="distill_methods.consistency.method:ConsistencyMethod",
    contract=2,
)
causal_consistency = MethodPlugin(
    name="causal_consistency",
    help="few-step causal student of a causal teacher's trajectory (student, teacher)",
    config_class=CausalConsistencyConfig,
    implementation="distill_methods.causal_consistency.method:CausalConsistencyMethod",
    contract=2,
)
rcm = MethodPlugin(
    name="rcm",
    help="consistency and distribution matching together (student, teacher, critic)",
    config_class=RCMConfig,
    implementation="distill_methods.rcm.method:RCMMethod",
    contract=2,
)
flow_map = MethodPlugin(
    name="flow_map",
    help="one student for any number of steps, by average velocities (student, teacher)",
    config_class=FlowMapConfig,
    implementation="distill_methods.flow_map.method:FlowMapMethod",
    contract=2,
)
flow_map_dmd = MethodPlugin(
    name="flow_map_dmd",
    help="a flow map's own clips by distribution matching (student, teacher, critic)",
    config_class=FlowMapDMDConfig,
    implementation="distill_methods.flow_map_dmd.method:FlowMapDMDMethod",
    contract=2,
)
self_forcing = MethodPlugin(
    name="self_forcing",
    help="causal student by distribution matching of its own rollouts (student, teacher, critic)",
    config_class=SelfForcingConfig,
    implementation="distill_methods.self_forcing.method:SelfForcingMethod",
    contract=2,
)
streaming_long_tuning = MethodPlugin(
    name="streaming_long_tuning",
    help="causal student by distribution matching of long videos (student, teacher, critic)",
    config_class=StreamingConfig,
    implementation="distill_methods.streaming_long_tuning.method:StreamingMethod",
    contract=2,
)
causvid = MethodPlugin(
    name="causvid",
    help="causal student by distribution matching on noised data (student, teacher, critic)",
    config_class=CausVidConfig,
    implementation="distill_methods.causvid.method:CausVidMethod",
    contract=2,
)
kd = MethodPlugin(
    name="kd",
    help="student learns the ends of a teacher's stored trajectories (student)",
    config_class=KDConfig,
    implementation="distill_methods.kd.method:KDMethod",
    contract=2,
)
