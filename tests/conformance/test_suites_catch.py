"""Each check fails where its rule is broken: families and methods with one mistake each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from attrs import evolve, frozen
from distill_conformance import AdapterCase, ConformanceError, MethodCase
from distill_conformance.adapter_checks import (
    calls,
    causal,
    conditions,
    latents,
    loading,
    optional,
    sampling,
)
from distill_conformance.method_checks import configs, randomness, steps
from distill_conformance.toy import MEAN, ToyAdapter, ToyConfig, ToyExporter, ToyFamily
from distill_protocols import (
    Condition,
    MethodConfig,
    MethodPlugin,
    RandomStreams,
    RoleNeed,
    StepResult,
)
from distill_runtime import DistillMethod
from torch import Tensor

# -- families ---------------------------------------------------------------------------------


class RowsMixed(ToyAdapter):
    def forward(self, role, x_t, t, cond, **options):
        x_t = x_t + 0.01 * x_t.mean(dim=0, keepdim=True)
        return super().forward(role, x_t, t, cond, **options)


class GuidedTwice(ToyAdapter):
    def forward(self, role, x_t, t, cond, *, cfg=None, **options):
        w = cfg if cfg in (None, 0, 1) else cfg * cfg
        return super().forward(role, x_t, t, cond, cfg=w, **options)


class GuidedAroundTheCondition(ToyAdapter):
    """``c + w (c - u)``, as some codes write it."""

    def forward(self, role, x_t, t, cond, *, cfg=None, **options):
        w = cfg if cfg is None else cfg + 1
        return super().forward(role, x_t, t, cond, cfg=w, **options)


class GuidanceIgnoredWithoutNegative(ToyAdapter):
    def forward(self, role, x_t, t, cond, *, cfg=None, neg_cond=None, **options):
        cfg = cfg if neg_cond is not None else None
        return super().forward(role, x_t, t, cond, cfg=cfg, neg_cond=neg_cond, **options)


class PromptIgnored(ToyAdapter):
    def _text(self, cond: Condition, rows: int) -> Tensor:
        return 0 * super()._text(cond, rows)


class TimeInPlace(ToyAdapter):
    def forward(self, role, x_t, t, cond, **options):
        v = super().forward(role, x_t, t, cond, **options)
        t.mul_(0.5)
        return v


class GradientToTheTeacher(ToyAdapter):
    def forward(self, role, x_t, t, cond, **options):
        self._net("teacher").requires_grad_(True)
        v = super().forward(role, x_t, t, cond, **options)
        return v + 1e-3 * self._net("teacher").outer.bias.sum()


class LayerDetached(ToyAdapter):
    def _net(self, role: str) -> Any:
        net = self.bundle[role].modules["transformer"]
        return lambda *inputs: net.velocity(net.features(*inputs).detach())


class GlobalNoise(ToyAdapter):
    def sample(self, role, spec, noise, cond, **options):
        torch.randn(1)
        return super().sample(role, spec, noise, cond, **options)


class RoundedTime(ToyAdapter):
    def _check_inputs(self, x_t: Tensor, t: Tensor) -> None:
        """Takes any."""


class MissingKey(ToyAdapter):
    def _text(self, cond: Condition, rows: int) -> Tensor:
        return cond.expand(rows).tensors["text"]


class NeverQuiteNoise(ToyAdapter):
    def add_noise(self, x0, noise, t):
        return super().add_noise(x0, noise, t.clamp(max=999))


class WrongSign(ToyAdapter):
    def target(self, x0, noise, t, pred_type="v"):
        return x0 - noise if pred_type == "v" else super().target(x0, noise, t, pred_type)


class NormalisedWithoutStd(ToyAdapter):
    def normalize_latents(self, latents: Tensor) -> Tensor:
        return latents - MEAN


class BrightClips(ToyAdapter):
    def decode(self, latents: Tensor) -> Tensor:
        return 2 * super().decode(latents)


class BlindEncoder(ToyAdapter):
    def encode(self, video: Tensor) -> Tensor:
        return torch.zeros_like(super().encode(video))


class OneStepLess(ToyAdapter):
    def rollout(self, role, spec, noise, cond, *, exit_steps, **options):
        exit_indices = [max(k - 1, 0) for k in exit_steps]
        return super().rollout(role, spec, noise, cond, exit_steps=exit_indices, **options)


class GraphOfAllSteps(ToyAdapter):
    def forward(self, role, x_t, t, cond, **options):
        with torch.enable_grad():
            return super().forward(role, x_t, t, cond, **options)


class TrainsAllChunks(ToyAdapter):
    def rollout(self, role, spec, noise, cond, *, requires_grad=None, **options):
        return super().rollout(role, spec, noise, cond, **options)


class DeafToStop(ToyAdapter):
    def sample(self, role, spec, noise, cond, *, poll=None, **options):
        return super().sample(role, spec, noise, cond, **options)


class WrongSchedule(ToyAdapter):
    def sample(self, role, spec, noise, cond, **options):
        later = evolve(spec, shift=1.0, timesteps=tuple(900 * s for s in spec.sigmas()))
        return super().sample(role, later, noise, cond, **options)


class NoTangents(ToyAdapter):
    @property
    def tangents(self) -> None:
        return None


class TangentWithoutTime(ToyAdapter):
    def forward_jvp(self, role, x_t, t, cond, *, dx, dt):
        return super().forward_jvp(role, x_t, t, cond, dx=dx, dt=0 * dt)


class FirstTimeForAllFrames(ToyAdapter):
    def forward(self, role, x_t, t, cond, **options):
        return super().forward(role, x_t, t[:, 0] if t.dim() == 2 else t, cond, **options)


class FeaturesDetached(ToyAdapter):
    def _fill_features(self, role, features, inputs, w):
        super()._fill_features(role, features, inputs, w)
        features[0] = features[0].detach()


class FutureSeen(ToyAdapter):
    def _past_of(self, role, x_t, caches):
        past = super()._past_of(role, x_t, caches)
        return past + x_t.mean(dim=2, keepdim=True) if caches is None else past


class CacheKeptByEveryCall(ToyAdapter):
    def forward(self, role, x_t, t, cond, *, caches=None, **options):
        if caches is not None and hasattr(caches, "store"):
            caches = evolve(caches, store=True)
        return super().forward(role, x_t, t, cond, caches=caches, **options)


class NothingForgotten(ToyAdapter):
    def clear_caches(self, role: str, *, stream: str | None = None) -> None:
        """Keeps all."""


class OldContract(ToyFamily):
    contract: ClassVar[int] = 1


class PlansMore(ToyFamily):
    def plan(self, role, config):
        plan = super().plan(role, config)
        trained = [
            evolve(m, tensors=tuple(evolve(t, trained=True) for t in m.tensors))
            for m in plan.modules
        ]
        return evolve(plan, modules=tuple(trained))


class DrawsAtRandom(ToyFamily):
    def load(self, roles, config, **options):
        bundle = super().load(roles, config, **options)
        for module in bundle.by_module("modules").values():
            module.outer.bias.data.normal_()
        return bundle


class IgnoresWeights(ToyFamily):
    def load(self, roles, config, *, weights: Any = None, **options):
        return super().load(roles, config, **options)


class ForgetsACondition(ToyFamily):
    def condition_shapes(self, config, *, source) -> Mapping[str, tuple[int, ...]]:
        return {**super().condition_shapes(config, source=source), "mask": (5,)}


class BlindExporter(ToyExporter):
    def verify(self, role, weights, folder, request):
        return {"notes": []}


class ExportsAnything(ToyFamily):
    def exporter(self, config, *, source):
        return BlindExporter()


class OneExitForAllRows(ToyAdapter):
    def forward_at_exits(self, role, x_t, t, cond, *, exits, **options):
        exits = exits[:1].expand(*exits.shape)
        return super().forward_at_exits(role, x_t, t, cond, exits=exits, **options)


BROKEN_FAMILIES: list[tuple[type, Callable[[AdapterCase], None]]] = [
    (RowsMixed, calls.check_batch_invariance),
    (RowsMixed, sampling.check_samples_are_independent),
    (GuidedTwice, calls.check_guidance),
    (GuidedAroundTheCondition, calls.check_guidance),
    (GuidanceIgnoredWithoutNegative, calls.check_guidance_needs_a_negative),
    (PromptIgnored, calls.check_model_reads_its_inputs),
    (TimeInPlace, calls.check_inputs_are_kept),
    (GradientToTheTeacher, calls.check_gradients),
    (GradientToTheTeacher, calls.check_no_gradient_modes),
    (LayerDetached, calls.check_gradients),
    (GlobalNoise, calls.check_global_random_state),
    (RoundedTime, calls.check_wrong_inputs),
    (MissingKey, conditions.check_missing_condition),
    (ForgetsACondition, conditions.check_condition_shapes),
    (NeverQuiteNoise, latents.check_noise_ends),
    (WrongSign, latents.check_conversions),
    (NormalisedWithoutStd, latents.check_normalization),
    (BrightClips, latents.check_codec),
    (BlindEncoder, latents.check_codec),
    (OneStepLess, sampling.check_rollout_is_sample),
    (OneStepLess, sampling.check_rollout_exits),
    (OneStepLess, sampling.check_rollout_predicts_at_its_exit),
    (GraphOfAllSteps, sampling.check_rollout_exits),
    (TrainsAllChunks, sampling.check_rollout_trains_the_role),
    (DeafToStop, sampling.check_stop),
    (WrongSchedule, sampling.check_sampler_follows_the_spec),
    (NoTangents, optional.check_capabilities),
    (TangentWithoutTime, optional.check_tangents),
    (FirstTimeForAllFrames, optional.check_frame_times),
    (FeaturesDetached, optional.check_features),
    (OneExitForAllRows, optional.check_exits),
    (FutureSeen, causal.check_causality),
    (FutureSeen, causal.check_cached_calls),
    (CacheKeptByEveryCall, causal.check_cache_rules),
    (NothingForgotten, causal.check_cache_rules),
    (OldContract, loading.check_plugin),
    (PlansMore, loading.check_plan_is_what_loads),
    (DrawsAtRandom, loading.check_loading_is_deterministic),
    (DrawsAtRandom, calls.check_global_random_state),
    (IgnoresWeights, loading.check_weights_round_trip),
    (IgnoresWeights, loading.check_incomplete_weights),
    (ExportsAnything, loading.check_exports),
]


def family_of(broken: type) -> ToyFamily:
    """Return the toy family with a broken adapter, or a broken family."""
    if issubclass(broken, ToyFamily):
        return broken()

    class Broken(ToyFamily):
        def adapter(self, bundle, config, *, source):
            return broken(bundle, config, self.capabilities(config))

    return Broken()


@pytest.mark.parametrize(
    ("broken", "check"), BROKEN_FAMILIES, ids=lambda value: value.__name__.replace("check_", "")
)
def test_a_broken_family_is_caught(broken: type, check: Callable[[AdapterCase], None]):
    causal_roles = ("student",) if check.__module__.endswith("causal") else ()
    config = ToyConfig(causal_roles=causal_roles)
    check(AdapterCase(plugin=ToyFamily(), config=config, source="toy"))
    with pytest.raises(ConformanceError):
        check(AdapterCase(plugin=family_of(broken), config=config, source="toy"))


# -- methods ----------------------------------------------------------------------------------


@frozen(kw_only=True)
class MatchConfig(MethodConfig):
    """Two trained roles that take turns in following a teacher."""

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        return tuple(
            RoleNeed(name=name, trainable=name != "teacher")
            for name in ("student", "critic", "teacher")
        )

    def turns(self, iteration: int) -> tuple[str, ...]:
        return ("student",) if iteration % 2 else ("critic",)

    @property
    def capabilities(self) -> tuple[str, ...]:
        return ("pred:v",)


class Match(DistillMethod[ToyAdapter]):
    """Regression on the teacher's velocity; the parts that the broken ones replace are methods."""

    required_roles = ("student", "critic", "teacher")
    trained_roles = ("student", "critic")
    frozen_roles = ("teacher",)

    def __init__(self, bundle, adapter, config, *, conditioning, streams=None):
        super().__init__(bundle, adapter, streams=streams)
        self.check_capabilities(config.capabilities)
        self.config = config
        self.seen = 0

    def get_optimizers(self, iteration):
        return self.optimizers_of(*self.config.turns(iteration))

    def target(self, x_t, t, cond) -> Tensor:
        with torch.no_grad():
            return self.adapter.forward("teacher", x_t, t, cond)

    def loss(self, v: Tensor, target: Tensor, iteration: int) -> Tensor:
        return (v - target).square().mean()

    def rows(self, size: int):
        return self.streams.rows("match", size)

    def single_train_step(self, batch, iteration):
        rows = self.rows(len(batch))
        t = 1000 * rows.uniform()
        x0 = self.adapter.normalize_latents(batch.latents)
        x_t = self.adapter.add_noise(x0, rows.normal(x0.shape[1:]), t)
        (role,) = self.config.turns(iteration)
        v = self.adapter.forward(role, x_t, t, batch.cond)
        loss = self.loss(v, self.target(x_t, t, batch.cond), iteration)
        return StepResult({"total_loss": loss}, {"v": v.detach()})


class TeacherMoves(Match):
    def target(self, x_t, t, cond):
        for module in self.bundle["teacher"].modules.values():
            with torch.no_grad():
                module.outer.bias.add_(0.01)
        return super().target(x_t, t, cond)


class TeacherGetsGradient(Match):
    def target(self, x_t, t, cond):
        self.bundle["teacher"].modules["transformer"].requires_grad_(True)
        return self.adapter.forward("teacher", x_t, t, cond)


class OthersTurn(Match):
    def target(self, x_t, t, cond):
        return self.adapter.forward("critic", x_t, t, cond)


class BatchNormalised(Match):
    def loss(self, v, target, iteration):
        difference = (v - target).square().mean(dim=(1, 2, 3, 4))
        return (difference * difference / difference.detach().sum()).sum()


class SumOfLosses(Match):
    def loss(self, v, target, iteration):
        return (v - target).square().sum()


class ForgetsItsCounter(Match):
    def loss(self, v, target, iteration):
        self.seen += 1
        return super().loss(v, target, iteration) * (1 + 1 / self.seen)


class DrawsGlobally(Match):
    def loss(self, v, target, iteration):
        return super().loss(v, target, iteration) * torch.rand(())


class SameNoiseEverywhere(Match):
    def rows(self, size: int):
        return RandomStreams(self.streams.seed).rows("match", size)


class SeedOfItsOwn(Match):
    def rows(self, size: int):
        return RandomStreams(3, rank=self.streams.rank, world_size=2).rows("match", size)


class ChoicesOfItsOwn(Match):
    def loss(self, v, target, iteration):
        generator = self.streams.get("match.calls")
        for _ in range(int(torch.randint(4, (), generator=generator))):
            self.adapter.forward("teacher", target, torch.zeros(len(v)), self.text(len(v)))
        return super().loss(v, target, iteration)

    def text(self, rows: int) -> Condition:
        return Condition({"text": torch.zeros(rows, 5)})


class NamesNoTotal(Match):
    def single_train_step(self, batch, iteration):
        result = super().single_train_step(batch, iteration)
        return StepResult({"loss": result.loss_map["total_loss"]}, result.outputs)


class KeepsTheGraph(Match):
    def single_train_step(self, batch, iteration):
        result = super().single_train_step(batch, iteration)
        return StepResult(result.loss_map, {"loss": result.loss_map["total_loss"]})


class TakesAnyFamily(Match):
    def check_capabilities(self, needed) -> None:
        """Asks for nothing."""


class TakesAnyRoles(Match):
    required_roles = ()
    trained_roles = ()
    frozen_roles = ()


@frozen(kw_only=True)
class NobodysTurn(MatchConfig):
    def turns(self, iteration):
        return () if iteration % 3 == 0 else super().turns(iteration)


@frozen(kw_only=True)
class CriticNeverLearns(MatchConfig):
    def turns(self, iteration):
        return ("student",)


@frozen(kw_only=True)
class SharesTooMuch(MatchConfig):
    def update_share(self, role, low, high):
        return min(1.0, (high - low) / 500)


class MeasuresMore(Match):
    def single_train_step(self, batch, iteration):
        losses, outputs = super().single_train_step(batch, iteration)
        return StepResult({**losses, "penalty": losses["total_loss"]}, outputs)


@frozen(kw_only=True)
class NamesWhatIsNotMeasured(MatchConfig):
    def metrics(self, iteration):
        return (*super().metrics(iteration), "spread")


@frozen(kw_only=True)
class SaysThatCaptionsDo(MatchConfig):
    @property
    def needs_latents(self):
        return False


class ReadsNoLatents(Match):
    def single_train_step(self, batch, iteration):
        latents = torch.zeros(len(batch), *batch.latent_shape)
        return super().single_train_step(evolve(batch, latents=latents), iteration)


BROKEN_METHODS: list[tuple[type, Callable[[MethodCase], None]]] = [
    (TeacherMoves, steps.check_isolation),
    (TeacherGetsGradient, steps.check_isolation),
    (TeacherGetsGradient, steps.check_stepping),
    (OthersTurn, steps.check_stepping),
    (BatchNormalised, steps.check_neighbours),
    (SumOfLosses, steps.check_accumulation),
    (SaysThatCaptionsDo, steps.check_captions_alone),
    (ReadsNoLatents, steps.check_captions_alone),
    (ForgetsItsCounter, steps.check_resume),
    (DrawsGlobally, randomness.check_global_random_state),
    (SameNoiseEverywhere, randomness.check_ranks),
    (SeedOfItsOwn, randomness.check_determinism),
    (ChoicesOfItsOwn, randomness.check_ranks),
    (NamesNoTotal, steps.check_losses),
    (KeepsTheGraph, steps.check_losses),
    (MeasuresMore, steps.check_losses),
    (NamesWhatIsNotMeasured, steps.check_losses),
    (TakesAnyFamily, configs.check_capability_names),
    (TakesAnyRoles, configs.check_missing_roles),
    (NobodysTurn, configs.check_roles_and_turns),
    (CriticNeverLearns, configs.check_roles_and_turns),
    (SharesTooMuch, configs.check_update_share),
]


def method_case(method: type, config: type[MatchConfig] = MatchConfig) -> MethodCase:
    class Plugin(MethodPlugin[MatchConfig]):
        def build(self, config, *, bundle, adapter, conditioning, streams):
            return method(bundle, adapter, config, conditioning=conditioning, streams=streams)

    plugin = Plugin(
        name="match", help="follows a teacher", config_class=config, implementation="-", contract=2
    )
    return MethodCase(plugin=plugin, config=config())


@pytest.mark.parametrize(
    ("broken", "check"), BROKEN_METHODS, ids=lambda value: value.__name__.replace("check_", "")
)
def test_a_broken_method_is_caught(broken: type, check: Callable[[MethodCase], None]):
    check(method_case(Match))
    is_config = issubclass(broken, MethodConfig)
    with pytest.raises(ConformanceError):
        check(method_case(Match, broken) if is_config else method_case(broken))
