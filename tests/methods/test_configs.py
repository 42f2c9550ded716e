"""Every rule of every option: refused values and their messages."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

import pytest
from attrs import evolve
from distill_methods import (
    AnchorConfig,
    CausVidConfig,
    ConsistencyConfig,
    DMD2Config,
    FinetuneConfig,
    KDConfig,
    LaddConfig,
    SelfForcingConfig,
    TeacherOnlyConfig,
    TimeSampling,
)
from distill_methods.latent_method import LatentMethod
from distill_methods.plugins import (
    causvid,
    consistency,
    dmd2,
    finetune,
    flow_map,
    flow_map_dmd,
    kd,
    ladd,
    rcm,
    self_forcing,
    teacher_only,
)
from distill_protocols import (
    Capabilities,
    Chunk,
    MethodPlugin,
    PlannedRun,
    RoleSpec,
    SamplerSpec,
)
from distill_runtime import load_plugin

WRONG_OPTIONS = [
    (DMD2Config, {"generator_update_interval": 0}, "0 must be at least 1.*never be updated"),
    (DMD2Config, {"generator_update_interval": 1}, "the critic no iteration.*every_step"),
    (DMD2Config, {"critic_update": "never"}, "'alternate', 'every_step'.*got 'never'"),
    (DMD2Config, {"real_score_guidance_scale": -1.0}, "-1.0 must be at least 0.*away from"),
    (DMD2Config, {"real_score_guidance_scale": float("inf")}, "inf must be .* finite"),
    (DMD2Config, {"real_score_guidance_scale": (1.5, -1.0)}, "-1.0 must be at least 0"),
    (DMD2Config, {"real_score_guidance_scale": (1.5, 1.0)}, "has 2 numbers.*takes 4 steps"),
    (DMD2Config, {"exit": (1.0, 3.0)}, "has 2 weights.*takes 4 steps"),
    (DMD2Config, {"exit": (0.0, 0.0, 0.0, 0.0)}, "not all 0"),
    (DMD2Config, {"exit": (1.0, -1.0, 1.0, 1.0)}, "none below 0"),
    (DMD2Config, {"exit": "last", "critic_exits": True}, "leave its sampler at the same step"),
    (SelfForcingConfig, {"last_step_only": True, "critic_exits": True}, "true has no effect"),
    (SelfForcingConfig, {"last_step_only": True, "exit": "last"}, "written otherwise"),
    (DMD2Config, {"critic_interpolation": 1.0}, r"1.0 must be in \[0, 1\)"),
    (DMD2Config, {"critic_interpolation": 0.03}, "not its turn. Use critic_update: every_step"),
    (DMD2Config, {"anchor": AnchorConfig(), "exit": (1.0, 0.0, 0.0, 0.0)}, "nothing would be"),
    (
        DMD2Config,
        {"anchor": AnchorConfig(), "student_sampler": SamplerSpec(steps=2, timesteps=(900, 400))},
        "begins at t = 900, and an anchor is a way that begins at noise",
    ),
    (DMD2Config, {"decoupled": True, "real_score_guidance_scale": 1.0}, "no teacher is guided"),
    (DMD2Config, {"decoupled": True, "rollout": "data"}, "true needs rollout: simulate"),
    (AnchorConfig, {"weight": 0.0}, "0.0 must be above 0"),
    (AnchorConfig, {"anchor_step": 41}, r"41 must be one of the teacher's steps.*\(40\)"),
    (DMD2Config, {"rollout": "replay"}, "'simulate', 'data'.*got 'replay'"),
    (DMD2Config, {"student_sampler": SamplerSpec(steps=4, guidance=3.0)}, "guidance 3.0 must be 1"),
    *(
        (config, {"student_sampler": SamplerSpec(steps=4, solver="unipc")}, "unipc makes each step")
        for config in (DMD2Config, SelfForcingConfig, KDConfig, LaddConfig, ConsistencyConfig)
    ),
    (
        TeacherOnlyConfig,
        {"input": "student", "student_sampler": SamplerSpec(steps=4, solver="unipc")},
        "unipc makes each step",
    ),
    (DMD2Config, {"score_shift": 0.0}, "0.0 must be above 0"),
    (DMD2Config, {"score_t_min": -1.0}, r"-1.0 must be within \[0, 1000\]"),
    (DMD2Config, {"score_t_max": 1001.0}, r"1001.0 must be within \[0, 1000\]"),
    (DMD2Config, {"score_t_max": float("nan")}, r"nan must be within \[0, 1000\]"),
    (DMD2Config, {"score_t_min": 980.0}, r"980.0 must be above score_t_min \(980.0\)"),
    (DMD2Config, {"score_t_limits": "draw"}, "'clamp', 'truncate'.*got 'draw'"),
    (
        DMD2Config,
        {"score_t_min": 0.0, "score_t_max": 1000.0, "score_t_limits": "truncate"},
        "truncate has no effect",
    ),
    (DMD2Config, {"fake_score_guidance_scale": 2.0}, "which it never learns"),
    (
        DMD2Config,
        {
            "fake_score_guidance_scale": 2.0,
            "critic_condition_dropout": 0.1,
            "critic_exits": True,
        },
        "cannot be used with critic_exits",
    ),
    (DMD2Config, {"critic_condition_dropout": 1.5}, r"1.5 must be within \[0, 1\]"),
    (TeacherOnlyConfig, {"guidance_scale": -0.5}, "-0.5 must be at least 0.*away from"),
    (FinetuneConfig, {"weighting": "min_snr"}, "'none', 'bsmntw'.*got 'min_snr'"),
    (FinetuneConfig, {"times": "per_frame"}, "'per_clip', 'per_chunk'.*got 'per_frame'"),
    (FinetuneConfig, {"past_t_max": 200.0}, "no effect.*Set past: clean"),
    (
        FinetuneConfig,
        {
            "past": "clean",
            "student_sampler": SamplerSpec(steps=2, context_noise=100.0),
            "past_t_max": 100.0,
        },
        r"must lie above student_sampler.context_noise \(100\)",
    ),
    (FinetuneConfig, {"past": "dirty"}, "'noisy', 'clean'.*got 'dirty'"),
    (SelfForcingConfig, {"gradient_frames": 0}, "0 must be at least 1.*never learn"),
    (SelfForcingConfig, {"rollout_frames": (0, 4)}, r"\[0, 4\] must be \[min, max\]"),
    (SelfForcingConfig, {"rollout_frames": (24, 21)}, r"\[24, 21\] must be \[min, max\]"),
    (SelfForcingConfig, {"last_step_only": True, "same_step_across_chunks": False}, "no effect"),
    (CausVidConfig, {"generator_update_interval": 1}, "the critic no iteration.*every_step"),
    (TimeSampling, {"distribution": "beta"}, "'uniform', 'logit_normal'.*got 'beta'"),
    (TimeSampling, {"std": 0.0, "distribution": "logit_normal"}, "0.0 must be above 0"),
    (TimeSampling, {"mean": 50.0, "distribution": "logit_normal"}, "50.0 must be within"),
    (TimeSampling, {"mean": 1.0}, "1.0 has no effect.*Set distribution: logit_normal"),
    (TimeSampling, {"std": 0.5}, "0.5 has no effect.*Set distribution: logit_normal"),
    (TimeSampling, {"shift": -3.0}, "-3.0 must be above 0"),
    (TimeSampling, {"t_min": -5.0}, r"-5.0 must be within \[0, 1000\]"),
    (TimeSampling, {"t_max": 2000.0}, r"2000.0 must be within \[0, 1000\]"),
    (
        TimeSampling,
        {"distribution": "logit_normal", "mean": -9.0, "t_min": 900.0, "limits": "truncate"},
        "truncate draws t from 900 to 1000, where",
    ),
    (TimeSampling, {"t_min": 500.0, "t_max": 400.0}, r"400.0 must be above t_min \(500.0\)"),
]


@pytest.mark.parametrize(("config", "options", "message"), WRONG_OPTIONS)
def test_the_error_of_a_wrong_option_has_the_reason(config: type, options: dict, message: str):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        config(**options)


@pytest.mark.parametrize(("interval", "cadence", "student", "critic"), [
    (5, "alternate", 4, 16), (5, "every_step", 4, 20), (1, "every_step", 20, 20),
    (2, "alternate", 10, 10), (30, "alternate", 0, 20),
])  # fmt: skip
def test_turns_of_twenty_iterations(interval: int, cadence: str, student: int, critic: int):
    config = DMD2Config(generator_update_interval=interval, critic_update=cadence)
    turns = [config.turns(i) for i in range(1, 21)]
    assert sum("student" in turn for turn in turns) == student
    assert sum("critic" in turn for turn in turns) == critic
    first = next((i for i, turn in enumerate(turns, 1) if "student" in turn), None)
    assert first == (interval if student else None)


def test_plugins_state_roles_capabilities_and_guidance():
    guided, plain = DMD2Config(), DMD2Config(real_score_guidance_scale=1.0)
    assert [r.name for r in guided.roles] == ["student", "teacher", "critic"]
    assert [r.trainable for r in guided.roles] == [True, False, True]
    assert guided.needs_negative
    assert not plain.needs_negative
    assert "supports_cfg" in guided.capabilities
    assert "supports_cfg" not in plain.capabilities
    assert [r.name for r in TeacherOnlyConfig().roles] == ["student", "teacher"]
    assert [r.name for r in FinetuneConfig().roles] == ["student"]
    unguided = FinetuneConfig(student_sampler=SamplerSpec(steps=4, solver="unipc"))
    assert not unguided.needs_negative
    assert FinetuneConfig().needs_negative


def test_options_that_need_a_causal_student():
    for config, needed in [
        (SelfForcingConfig(), {"causal:student", "supports_kv_cache"}),
        (CausVidConfig(), {"causal:student", "supports_frame_times"}),
        (FinetuneConfig(times="per_chunk"), {"causal:student", "supports_frame_times"}),
        (FinetuneConfig(past="clean"), {"causal:student", "supports_teacher_forcing"}),
    ]:
        assert needed <= set(config.capabilities)
    assert "causal:student" not in FinetuneConfig().capabilities


PLUGINS = [
    causvid, consistency, dmd2, finetune, flow_map, flow_map_dmd, kd, ladd, rcm, self_forcing,
    teacher_only,
]  # fmt: skip


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_plugins_are_found_by_name(plugin: MethodPlugin):
    assert load_plugin("distill.methods", plugin.name) is plugin
    with pytest.raises(TypeError, match="positional argument"):
        plugin.config_class(None)  # options have names, and no order


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_a_plugin_names_the_method_of_its_config(plugin: MethodPlugin):
    """The name of the class is a string, which no type checker reads."""
    module, name = plugin.implementation.split(":")
    method_class = getattr(import_module(module), name)
    assert method_class.name == plugin.name
    (base,) = method_class.__orig_bases__
    assert get_args(base) == (plugin.config_class,)


def test_no_method_inherits_from_another():
    for plugin in PLUGINS:
        module, name = plugin.implementation.split(":")
        assert getattr(import_module(module), name).__bases__ == (LatentMethod,)


def test_rollouts_are_held_against_chunks_where_these_are_known():
    def divide(role: str, frames: int) -> tuple[Chunk, ...]:
        assert role == "student"
        return tuple(Chunk(first, 3) for first in range(0, frames, 3))

    config = SelfForcingConfig(
        student_sampler=SamplerSpec(steps=2, stochastic=True), gradient_frames=2
    )
    names = ("student", "teacher", "critic")
    roles = {n: RoleSpec(name=n, path="x", trainable=n != "teacher") for n in names}
    planned = PlannedRun(roles=roles, clip_frames=(6,))
    before = list(config.problems(planned))
    (problem,) = [p for p in config.problems(evolve(planned, chunks=divide)) if p not in before]
    assert "2 is less than the 3 latent frames of the last chunk" in problem.message
    without_student = evolve(planned, roles={}, chunks=divide)
    assert not [p for p in config.problems(without_student) if "last chunk" in p.message]


@pytest.mark.parametrize("config", [DMD2Config, SelfForcingConfig, CausVidConfig])
def test_dropped_conditions_of_a_critic_need_a_negative_one(config: type):
    dropping = config(critic_condition_dropout=0.1)
    embeds = PlannedRun(roles={}, reads_negative=Capabilities(embeds_guidance=True).reads_negative)
    (problem,) = dropping.problems(embeds)
    assert problem.path == ("critic_condition_dropout",)
    assert "0.1 replaces conditions by the negative one, and there is none" in problem.message
    assert list(dropping.problems(PlannedRun(roles={}))) == []
    assert list(config().problems(embeds)) == []
