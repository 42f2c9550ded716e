"""All methods, with the options that change what a step calls, pass the suite of methods."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from distill_conformance import MethodCase, MethodSuite
from distill_methods import (
    CausalConsistencyConfig,
    CausVidConfig,
    ConsistencyConfig,
    Continuous,
    Discrete,
    DMD2Config,
    FinetuneConfig,
    GanConfig,
    KDConfig,
    LaddConfig,
    RCMConfig,
    SelfForcingConfig,
    StreamingConfig,
    TeacherOnlyConfig,
)
from distill_protocols import SamplerSpec
from distill_runtime import load_plugin

FOUR = SamplerSpec(steps=4, shift=5.0, stochastic=True)
ONE = SamplerSpec(steps=1, stochastic=True)
SCORES: dict[str, Any] = {"generator_update_interval": 2, "student_sampler": FOUR}
CAUSAL = {
    "causvid": ("student",), "self_forcing": ("student",), "kd, causal": ("student",),
    "causal_consistency": ("student", "teacher"), "streaming_long_tuning": ("student",),
}  # fmt: skip
CONFIGS = {
    "finetune": FinetuneConfig(),
    "teacher_only": TeacherOnlyConfig(),
    "dmd2": DMD2Config(**SCORES),
    "dmd2, every step, gan": DMD2Config(
        **SCORES, critic_update="every_step", gan=GanConfig(), f_divergence="js"
    ),
    "ladd": LaddConfig(student_sampler=FOUR),
    "consistency": ConsistencyConfig(discrete=Discrete(steps=8, shift=8.0, skip=2)),
    "consistency, continuous": ConsistencyConfig(continuous=Continuous(tangent_warmup=3)),
    "causal_consistency": CausalConsistencyConfig(
        discrete=Discrete(steps=8, shift=8.0, loss="l2"), target="student"
    ),
    "rcm": RCMConfig(**SCORES),
    "self_forcing": SelfForcingConfig(**SCORES),
    "streaming_long_tuning": StreamingConfig(**SCORES, video_frames=5, overlap_frames=1),
    "causvid": CausVidConfig(**SCORES),
    "kd": KDConfig(student_sampler=FOUR),
    "kd, causal": KDConfig(student_sampler=FOUR, past="clean"),
}
DRAWN_EXITS = (
    "dmd2",
    "dmd2, every step, gan",
    "ladd",
    "rcm",
    "self_forcing",
    "streaming_long_tuning",
)
"""A rollout's exit step is drawn once a micro batch; with one step there is no choice."""


@pytest.fixture(scope="module", params=CONFIGS)
def case(request) -> MethodCase:
    name, config = request.param, CONFIGS[request.param]
    full = evolve(config, student_sampler=ONE) if name in DRAWN_EXITS else config
    return MethodCase(
        plugin=load_plugin("distill.methods", name.split(",")[0]),
        config=config,
        accumulation_config=full,
        losses=2 if name == "rcm" else 1,
        causal_roles=CAUSAL.get(name, ()),
    )


class TestMethods(MethodSuite):
    pass
