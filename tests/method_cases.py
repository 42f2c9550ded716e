"""Every method once, and every kind of Wan that it is tested with: a new method is a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import evolve, field, frozen
from distill_adapters_wan import PLUGIN, CausalConfig
from distill_methods import (
    AnchorConfig,
    CausalConsistencyConfig,
    CausalConsistencyMethod,
    CausVidConfig,
    CausVidMethod,
    ConsistencyConfig,
    ConsistencyMethod,
    Continuous,
    Discrete,
    DMD2Config,
    DMD2Method,
    FinetuneConfig,
    FinetuneMethod,
    FlowMap,
    FlowMapConfig,
    FlowMapDMDConfig,
    FlowMapDMDMethod,
    FlowMapMethod,
    GanConfig,
    KDConfig,
    KDMethod,
    LaddConfig,
    LaddMethod,
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
    TimeSampling,
)
from distill_protocols import (
    Batch,
    Condition,
    DiscriminatorSpec,
    ModelBundle,
    RandomStreams,
    RoleSpec,
    SamplerSpec,
    TargetTimeSpec,
)
from distill_runtime import DistillMethod
from distill_trainer import OptimizerConfig, build_optimizers
from torch import Tensor
from wan_variants import VARIANTS

SHAPE = (4, 3, 4, 6)
# About half of it on either side of 875 and 900, the boundaries of the variants.
TIME = TimeSampling(shift=8.0)
FOUR = SamplerSpec(steps=4, shift=5.0, stochastic=True)
# One exit: it is then the same in every micro batch.
ONE = SamplerSpec(steps=1, stochastic=True)
SCORES: dict[str, Any] = {
    "generator_update_interval": 2, "score_shift": 8.0, "real_score_guidance_scale": 2.0,
}  # fmt: skip


@frozen(kw_only=True)
class MethodCase:
    """One method with one set of options.

    Attributes:
        students: kinds of student that it takes.
        experts: it takes a student of two experts.
        single: it takes a student of one.
        losses: of the student, each at a t of its own: an iteration may reach both of two experts.
        matches: it matches distributions: a critic equal to the teacher leaves it nothing to learn.
        one_exit: options under which no choice is drawn for each micro batch, so that divisions of
            a batch can be compared.
    """

    method: Callable[..., DistillMethod[Any]]
    config: Any
    students: tuple[str, ...] = ("bidirectional", "causal")
    experts: bool = True
    single: bool = True
    losses: int = 1
    matches: bool = False
    one_exit: Mapping[str, Any] = field(factory=dict)


def _dmd2(**options: Any) -> MethodCase:
    config = DMD2Config(**SCORES, student_sampler=FOUR, **options)
    return MethodCase(
        method=DMD2Method,
        config=config,
        matches="gan" not in options,
        one_exit={"student_sampler": ONE},
    )


def _causal(method: Any, config: Any, **options: Any) -> MethodCase:
    return MethodCase(method=method, config=config, students=("causal",), **options)


CASES: dict[str, MethodCase] = {
    "finetune": MethodCase(method=FinetuneMethod, config=FinetuneConfig(time=TIME)),
    "teacher_only": MethodCase(
        method=TeacherOnlyMethod, config=TeacherOnlyConfig(guidance_scale=2.0, time=TIME)
    ),
    "teacher_only, x0 of its own clips": MethodCase(
        method=TeacherOnlyMethod,
        config=TeacherOnlyConfig(
            guidance_scale=2.0, time=TIME, target="x0", input="student", student_sampler=FOUR
        ),
    ),
    "dmd2 alternate data": _dmd2(rollout="data"),
    "dmd2 every_step simulate": _dmd2(critic_update="every_step"),
    "dmd2 gan": _dmd2(gan=GanConfig(), f_divergence="js", rollout="data"),
    "dmd2 anchor": MethodCase(
        method=DMD2Method,
        config=DMD2Config(
            **SCORES, student_sampler=FOUR, anchor=AnchorConfig(teacher_steps=4, anchor_step=2)
        ),
        students=("bidirectional",),
        one_exit={
            "student_sampler": SamplerSpec(steps=2, timesteps=(1000, 950), stochastic=True)
        },
    ),
    "phased_dmd": MethodCase(
        method=PhasedDMDMethod,
        config=PhasedDMDConfig(**SCORES, student_sampler=evolve(FOUR, stochastic=False)),
        students=("bidirectional",), single=False, matches=True,
        one_exit={"student_sampler": SamplerSpec(steps=2, timesteps=(1000, 700))},
    ),
    "ladd": MethodCase(
        method=LaddMethod, config=LaddConfig(time=TIME, student_sampler=FOUR, rollout="simulate"),
        one_exit={"student_sampler": ONE},
    ),
    "consistency": MethodCase(
        method=ConsistencyMethod,
        config=ConsistencyConfig(
            guidance_scale=2.0, discrete=Discrete(steps=8, shift=8.0, skip=2)
        ),
    ),
    "consistency, continuous": MethodCase(
        method=ConsistencyMethod,
        config=ConsistencyConfig(guidance_scale=2.0, continuous=Continuous(tangent_warmup=3)),
        experts=False,
    ),
    "rcm, discrete": MethodCase(
        losses=2,
        method=RCMMethod, config=RCMConfig(**SCORES, student_sampler=FOUR, discrete=Discrete()),
        one_exit={"student_sampler": ONE},
    ),
    "rcm": MethodCase(
        method=RCMMethod, config=RCMConfig(**SCORES, student_sampler=FOUR), experts=False,
        one_exit={"student_sampler": ONE},
    ),
    "consistency, finite difference": MethodCase(
        method=ConsistencyMethod,
        config=ConsistencyConfig(
            guidance_scale=2.0,
            continuous=Continuous(tangent_warmup=3, derivative="finite_difference"),
        ),
        experts=False, students=("bidirectional",),
    ),
    "flow_map": MethodCase(
        method=FlowMapMethod,
        config=FlowMapConfig(flow_map=FlowMap(guidance_scale=2.0, time=TIME)),
        experts=False, students=("flow_map",),
    ),
    "flow_map of data": MethodCase(
        method=FlowMapMethod,
        config=FlowMapConfig(flow_map=FlowMap(velocity="data", guidance_scale=2.0, time=TIME)),
        experts=False, students=("flow_map",),
    ),
    "flow_map_dmd": MethodCase(
        method=FlowMapDMDMethod,
        config=FlowMapDMDConfig(**SCORES, flow_map=FlowMap(time=TIME), rollout_steps=(3,)),
        experts=False, students=("flow_map",), losses=2, one_exit={"rollout_steps": (1,)},
    ),
    "kd": MethodCase(method=KDMethod, config=KDConfig(student_sampler=FOUR)),
    "finetune, diffusion forcing": _causal(
        FinetuneMethod, FinetuneConfig(time=TIME, times="per_chunk")
    ),
    "finetune, teacher forcing": _causal(FinetuneMethod, FinetuneConfig(time=TIME, past="clean")),
    "kd, teacher forcing": _causal(KDMethod, KDConfig(student_sampler=FOUR, past="clean")),
    "self_forcing": _causal(
        SelfForcingMethod, SelfForcingConfig(**SCORES, student_sampler=FOUR),
        matches=True, one_exit={"student_sampler": ONE},
    ),
    "self_forcing, steps of their own": _causal(
        SelfForcingMethod,
        SelfForcingConfig(
            **SCORES, student_sampler=evolve(FOUR, context_noise=100.0),
            same_step_across_chunks=False, critic_update="every_step",
        ),
        matches=True, one_exit={"student_sampler": evolve(ONE, context_noise=100.0)},
    ),
    "streaming_long_tuning": _causal(
        StreamingMethod,
        StreamingConfig(
            **SCORES, student_sampler=FOUR, video_frames=9, overlap_frames=1,
            switch_probability=0.5,
        ),
        matches=True, one_exit={"student_sampler": ONE},
    ),
    "causal_consistency": MethodCase(
        method=CausalConsistencyMethod,
        config=CausalConsistencyConfig(
            guidance_scale=2.0, discrete=Discrete(steps=8, shift=8.0, loss="l2"), target="student"
        ),
        students=("causal, as its teacher",),
    ),
    "causvid": _causal(
        CausVidMethod, CausVidConfig(**SCORES, student_sampler=FOUR), matches=True
    ),
}  # fmt: skip

CAUSAL_ROLES: dict[str, tuple[str, ...]] = {
    "bidirectional": (),
    "causal": ("student",),
    "causal, as its teacher": ("student", "teacher"),
    "flow_map": (),
}
"""By kind of student."""

PLACES = [
    (name, variant, student)
    for name, case in CASES.items()
    for variant, kind in VARIANTS.items()
    # A last frame is more of the same condition, of which methods know nothing.
    if not kind.pair
    if case.experts or kind.experts == 1
    if case.single or kind.experts == 2
    for student in case.students
]
"""All combinations that are possible."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@frozen
class Conditioning:
    """A negative condition of text alone: pictures stay."""

    length: int

    def negative(self) -> Condition:
        return Condition({"text": torch.full((1, self.length, 16), 0.3)})

    def encode(self, prompts: object, images: object = None) -> Condition:
        raise NotImplementedError


class Setups:
    """Adapter and bundle of each variant and kind of student: loaded once, and never trained."""

    def __init__(self, folder_of: Callable[[str], str]) -> None:
        self._folder_of = folder_of
        self._loaded: dict[tuple[str, str], tuple[Any, ModelBundle]] = {}

    def __call__(self, variant: str, student: str) -> tuple[Any, ModelBundle]:
        key = (variant, student)
        if key not in self._loaded:
            config, path = VARIANTS[variant].config, self._folder_of(variant)
            if causal := CAUSAL_ROLES[student]:
                config = evolve(config, causal=CausalConfig(roles=causal, chunk_frames=1))
            target_time = TargetTimeSpec() if student == "flow_map" else None
            roles = [
                RoleSpec(name=role, path=path, trainable=role != "teacher")
                for role in ("student", "teacher", "critic")
            ]
            roles[0] = evolve(roles[0], target_time=target_time)
            heads = DiscriminatorSpec(on="teacher", blocks=(0, 1), width=8)
            roles.append(RoleSpec(name="discriminator", path=path, trainable=True, heads=heads))
            bundle = PLUGIN.load(roles, config, device=torch.device("cpu"))
            for seed, module in enumerate(bundle.by_module("modules").values()):
                for parameter in module.parameters():
                    parameter.data.add_(normal(*parameter.shape, seed=seed), alpha=0.02)
            self._loaded[key] = PLUGIN.adapter(bundle, config, source=path), bundle
        return self._loaded[key]

    def build(
        self,
        case: str,
        variant: str,
        student: str,
        *,
        seed: int = 0,
        streams: RandomStreams | None = None,
        **options: Any,
    ) -> DistillMethod[Any]:
        """Build the method with fresh optimizers and averages."""
        adapter, bundle = self(variant, student)
        for role in bundle.roles.values():
            role.ema.clear()
            if role.trainable:
                build_optimizers(role, OptimizerConfig(lr=1e-4), horizon=50)
        row = CASES[case]
        return row.method(
            bundle,
            adapter,
            evolve(row.config, **options),
            conditioning=Conditioning(VARIANTS[variant].config.max_sequence_length),
            streams=streams or RandomStreams(seed),
        )

    def batch(self, variant: str, size: int, seed: int = 1) -> Batch:
        """Random clips and texts, and what the variant reads of pictures."""
        kind, (adapter, _) = VARIANTS[variant], self(variant, "bidirectional")
        cond = Condition({"text": normal(size, kind.config.max_sequence_length, 16, seed=seed)})
        if kind.image:
            cond = adapter.with_image(cond, normal(size, 3, 32, 48, seed=seed + 1).sigmoid())
        return Batch(
            latents=normal(size, *SHAPE, seed=seed + 2),
            cond=cond,
            ids=tuple(map(str, range(size))),
            trajectory=normal(size, FOUR.steps, *SHAPE, seed=seed + 3),
        )


def part(whole: Batch, rows: slice) -> Batch:
    assert whole.trajectory is not None
    return Batch(
        latents=whole.latents[rows],
        cond=whole.cond[rows],
        ids=whole.ids[rows],
        trajectory=whole.trajectory[rows],
    )


def gradients(method: DistillMethod[Any]) -> dict[str, Tensor]:
    """Return the gradient of each module that has one, as one vector."""
    return {
        key: torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for key, module in method.model_dict.items()
        if any(p.grad is not None for p in module.parameters())
    }


def turns(method: DistillMethod[Any], iteration: int) -> set[str]:
    return {key.split(".")[0] for key in method.get_optimizers(iteration)}
