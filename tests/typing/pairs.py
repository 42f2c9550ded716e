"""Every shipped method with every shipped adapter, for the type checker alone: nothing runs this.

A new family adds its import and its entry in ``ADAPTERS``, a new method or plugin the same in
``every_method`` and ``PLUGINS``. ``test_pairs.py`` checks that none is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill_adapters_hunyuan import (
    HUNYUAN_VIDEO15_PLUGIN,
    HUNYUAN_VIDEO_PLUGIN,
    HunyuanVideo15Adapter,
    HunyuanVideoAdapter,
)
from distill_adapters_longcat import LongCatAdapter
from distill_adapters_longcat.plugin import PLUGIN as LONGCAT_FAMILY
from distill_adapters_ltx import LtxAdapter
from distill_adapters_ltx.plugin import PLUGIN as LTX_FAMILY
from distill_adapters_ltx2 import Ltx2Adapter
from distill_adapters_ltx2.plugin import PLUGIN as LTX2_FAMILY
from distill_adapters_qwen_image import QwenImageAdapter
from distill_adapters_qwen_image.plugin import PLUGIN as QWEN_IMAGE_FAMILY
from distill_adapters_wan import WanAdapter
from distill_adapters_wan.plugin import PLUGIN as WAN_FAMILY
from distill_adapters_z_image import ZImageAdapter
from distill_adapters_z_image.plugin import PLUGIN as Z_IMAGE_FAMILY
from distill_evaluation.health.plugin import health
from distill_evaluation.page.plugin import page
from distill_evaluation.plugins import report
from distill_methods import (
    CausalConsistencyConfig,
    CausalConsistencyMethod,
    CausVidConfig,
    CausVidMethod,
    ConsistencyConfig,
    ConsistencyMethod,
    DMD2Config,
    DMD2Method,
    FinetuneConfig,
    FinetuneMethod,
    FlowMapConfig,
    FlowMapDMDConfig,
    FlowMapDMDMethod,
    FlowMapMethod,
    KDConfig,
    KDMethod,
    LaddConfig,
    LaddMethod,
    LatentDiffusion,
    PhasedDMDConfig,
    PhasedDMDMethod,
    RCMConfig,
    RCMMethod,
    SelfForcingConfig,
    SelfForcingMethod,
    StreamingConfig,
    StreamingMethod,
    TeacherOnlyConfig,
    TeacherOnlyMethod,
)
from distill_methods.plugins import (
    causal_consistency,
    causvid,
    consistency,
    dmd2,
    finetune,
    flow_map,
    flow_map_dmd,
    kd,
    ladd,
    phased_dmd,
    rcm,
    self_forcing,
    streaming_long_tuning,
    teacher_only,
)
from distill_protocols import (
    ConditioningProvider,
    DistillAdapter,
    MethodPlugin,
    ModelBundle,
    Plugin,
    RandomStreams,
    TrainableMethod,
)
from distill_trainer.plugins import (
    debug_dump,
    ema,
    grad_clip,
    param_count,
    profiler,
    step_timer,
)

ADAPTERS: tuple[type[DistillAdapter], ...] = (
    HunyuanVideo15Adapter,
    HunyuanVideoAdapter,
    LongCatAdapter,
    Ltx2Adapter,
    LtxAdapter,
    QwenImageAdapter,
    WanAdapter,
    ZImageAdapter,
)
"""Each satisfies the whole contract, and with it what every method below asks for."""

PLUGINS: tuple[Plugin, ...] = (
    HUNYUAN_VIDEO15_PLUGIN,
    HUNYUAN_VIDEO_PLUGIN,
    LONGCAT_FAMILY,
    LTX2_FAMILY,
    LTX_FAMILY,
    QWEN_IMAGE_FAMILY,
    WAN_FAMILY,
    Z_IMAGE_FAMILY,
    causal_consistency,
    causvid,
    consistency,
    dmd2,
    finetune,
    flow_map,
    flow_map_dmd,
    kd,
    ladd,
    phased_dmd,
    rcm,
    self_forcing,
    streaming_long_tuning,
    teacher_only,
    debug_dump,
    ema,
    grad_clip,
    health,
    page,
    param_count,
    profiler,
    report,
    step_timer,
)


def wan(bundle: ModelBundle, adapter: WanAdapter, conditioning: ConditioningProvider):
    """Build every method with an adapter whose class is known, without the Protocol between."""
    return every_method(bundle, adapter, conditioning)


def every_adapter(bundle: ModelBundle, adapter: DistillAdapter, conditioning: ConditioningProvider):
    """Build every method with any adapter that satisfies the contract."""
    return every_method(bundle, adapter, conditioning)


def every_method(
    bundle: ModelBundle, adapter: LatentDiffusion, conditioning: ConditioningProvider
) -> Iterator[TrainableMethod]:
    """Build every method from its class, as a program does that uses no plugin."""
    streams = RandomStreams(0)
    yield CausalConsistencyMethod(
        bundle, adapter, CausalConsistencyConfig(), conditioning=conditioning, streams=streams
    )
    yield CausVidMethod(
        bundle, adapter, CausVidConfig(), conditioning=conditioning, streams=streams
    )
    yield ConsistencyMethod(
        bundle, adapter, ConsistencyConfig(), conditioning=conditioning, streams=streams
    )
    yield DMD2Method(bundle, adapter, DMD2Config(), conditioning=conditioning, streams=streams)
    yield FinetuneMethod(
        bundle, adapter, FinetuneConfig(), conditioning=conditioning, streams=streams
    )
    yield FlowMapMethod(
        bundle, adapter, FlowMapConfig(), conditioning=conditioning, streams=streams
    )
    yield FlowMapDMDMethod(
        bundle, adapter, FlowMapDMDConfig(), conditioning=conditioning, streams=streams
    )
    yield KDMethod(bundle, adapter, KDConfig(), conditioning=conditioning, streams=streams)
    yield LaddMethod(bundle, adapter, LaddConfig(), conditioning=conditioning, streams=streams)
    yield PhasedDMDMethod(
        bundle, adapter, PhasedDMDConfig(), conditioning=conditioning, streams=streams
    )
    yield RCMMethod(bundle, adapter, RCMConfig(), conditioning=conditioning, streams=streams)
    yield SelfForcingMethod(
        bundle, adapter, SelfForcingConfig(), conditioning=conditioning, streams=streams
    )
    yield StreamingMethod(
        bundle, adapter, StreamingConfig(), conditioning=conditioning, streams=streams
    )
    yield TeacherOnlyMethod(
        bundle, adapter, TeacherOnlyConfig(), conditioning=conditioning, streams=streams
    )


def through_its_plugin(
    bundle: ModelBundle, adapter: WanAdapter, conditioning: ConditioningProvider
) -> TrainableMethod:
    """Build a method as the app does: the plugin knows the type of its config."""
    plugin: MethodPlugin[DMD2Config] = dmd2
    return plugin.build(
        plugin.config_class(),
        bundle=bundle,
        adapter=adapter,
        conditioning=conditioning,
        streams=RandomStreams(0),
    )
