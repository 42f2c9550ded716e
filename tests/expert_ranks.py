"""What several processes do with a Wan of two experts (see ``ranks``): train each in its turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import evolve, frozen
from distill_adapters_wan import PLUGIN, CausalConfig, WanPipelineConfig
from distill_methods import (
    DMD2Config,
    DMD2Method,
    FinetuneConfig,
    FinetuneMethod,
    SelfForcingConfig,
    SelfForcingMethod,
    TimeSampling,
)
from distill_protocols import (
    Batch,
    Callback,
    Condition,
    ModelBundle,
    RandomStreams,
    RoleSpec,
    RowGenerators,
    RunState,
    SamplerSpec,
    StepRecord,
)
from distill_runtime import DistillMethod, Ranks
from distill_trainer import (
    DistillTrainer,
    DistributedConfig,
    Distribution,
    GradClipCallback,
    GradClipConfig,
    OptimizerConfig,
    TrainingConfig,
    build_optimizers,
)
from torch import Tensor
from torch.distributed.tensor import DTensor
from wan_variants import VARIANTS

CLIP = VARIANTS["t2v-experts"].config
SHAPE, TEXT = (4, 3, 4, 6), (CLIP.max_sequence_length, 16)
STEPS, SAMPLES = 6, 8


@frozen(kw_only=True)
class ExpertCase:
    """How a run is spread, and what it trains."""

    method: str
    strategy: str | None = None
    accumulation: int = 1

    def alone(self) -> ExpertCase:
        """In as many micro steps: rollouts draw one exit step for each."""
        return evolve(self, strategy=None)

    @property
    def pipeline(self) -> WanPipelineConfig:
        """Self-Forcing's student is causal: three chunks."""
        if self.method != "self_forcing":
            return CLIP
        return evolve(CLIP, causal=CausalConfig(roles=("student",), chunk_frames=1))


@frozen(kw_only=True)
class Outcome:
    """Of a run on this process.

    Attributes:
        stepped: which optimizers did, by iteration.
        reached: the modules with a gradient, by iteration.
        schedules: steps of each expert's schedule.
        weights: whole arrays.
        calls: (expert, t) of the student's model calls, in their order.
    """

    stepped: list[tuple[str, ...]]
    reached: list[frozenset[str]]
    schedules: dict[str, int]
    updates: dict[str, int]
    weights: dict[str, Any]
    sharded: bool
    calls: list[tuple[str, float]]


class Conditioning:
    """A negative condition, the same for all."""

    def negative(self) -> Condition:
        return Condition({"text": torch.full((1, *TEXT), 0.3)})

    def encode(self, prompts: Sequence[str], images: object = None) -> Condition:
        raise NotImplementedError


class Watch(Callback):
    """Who got a gradient, and who stepped."""

    name = "watch"

    def __init__(self) -> None:
        self.stepped: list[tuple[str, ...]] = []
        self.reached: list[frozenset[str]] = []

    def on_before_optimizer_step(self, run: RunState) -> None:
        modules = run.method.model_dict.items()
        self.reached.append(
            frozenset(k for k, m in modules if any(p.grad is not None for p in m.parameters()))
        )

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        self.stepped.append(step.stepped)


@frozen
class Data:
    """This process's samples, of all that there are every so-many-th."""

    size: int
    ranks: Ranks

    def __iter__(self) -> Iterator[Batch]:
        place = self.ranks.rank
        while True:
            rows = [place + i * self.ranks.size for i in range(self.size)]
            yield Batch(
                latents=RowGenerators.seeded(3, "latents", rows).normal(SHAPE),
                cond=Condition({"text": RowGenerators.seeded(3, "text", rows).normal(TEXT)}),
                ids=tuple(map(str, rows)),
            )
            place += self.size * self.ranks.size


def _bundle(folder: Path, case: ExpertCase, distribution: Distribution) -> ModelBundle:
    names = ("student",) if case.method == "finetune" else ("student", "teacher", "critic")
    specs = [RoleSpec(name=n, path=str(folder), trainable=n != "teacher") for n in names]
    bundle = PLUGIN.load(specs, case.pipeline, device=torch.device("cpu"), shard=distribution.shard)
    for role in bundle.roles.values():
        if role.trainable:
            build_optimizers(role, OptimizerConfig(lr=0.01, eps=1e-2), horizon=10)
    return bundle


def _method(folder: Path, case: ExpertCase, distribution: Distribution) -> DistillMethod[Any]:
    bundle = _bundle(folder, case, distribution)
    adapter = PLUGIN.adapter(bundle, case.pipeline, source=str(folder))
    ranks = distribution.ranks
    parts: dict[str, Any] = {
        "conditioning": Conditioning(),
        "streams": RandomStreams(1, rank=ranks.rank, world_size=ranks.size),
    }
    if case.method == "finetune":  # about half of its t on either side of 875
        config = FinetuneConfig(time=TimeSampling(shift=8.0))
        return FinetuneMethod(bundle, adapter, config, **parts)
    sampler = SamplerSpec(steps=4, shift=5.0, stochastic=True)
    matching: dict[str, Any] = {
        "critic_update": "every_step", "generator_update_interval": 2,
        "real_score_guidance_scale": 2.0, "score_shift": 8.0, "student_sampler": sampler,
    }  # fmt: skip
    if case.method == "dmd2":
        return DMD2Method(bundle, adapter, DMD2Config(rollout="simulate", **matching), **parts)
    own = SelfForcingConfig(same_step_across_chunks=False, rollout_frames=(3, 5), **matching)
    return SelfForcingMethod(bundle, adapter, own, **parts)


def trained(folder: Path, case: ExpertCase, out: str) -> Outcome:
    config = DistributedConfig(strategy=case.strategy, timeout_seconds=60.0)  # type: ignore[arg-type]
    with Distribution.start(config, "cpu") as distribution:
        ranks = distribution.ranks
        method, watch = _method(folder, case, distribution), Watch()
        calls = _noted(method)
        at_once = SAMPLES // case.accumulation // ranks.size
        training = TrainingConfig(
            output_dir=str(Path(out) / f"rank-{ranks.rank}"), max_train_steps=STEPS, trackers=(),
            global_batch_size=SAMPLES, batch_size_per_device=at_once, progress=False,
        )  # fmt: skip
        clip = GradClipCallback(GradClipConfig(max_norm=1.0))
        trainer = DistillTrainer(training, callbacks=[clip, watch], distribution=distribution)
        result = trainer.run(method, Data(at_once, ranks))
        parameters = {
            f"{key}.{name}": p
            for key, module in method.model_dict.items()
            for name, p in module.named_parameters()
        }
        return Outcome(
            stepped=watch.stepped,
            reached=watch.reached,
            schedules={
                f"{role.name}.{key}": schedule.last_epoch
                for role in method.bundle.roles.values()
                for key, schedule in role.schedulers.items()
            },
            updates=dict(result.updates),
            weights={name: _full_array(p) for name, p in parameters.items()},
            sharded=any(isinstance(p, DTensor) for p in parameters.values()),
            calls=calls,
        )


def _noted(method: DistillMethod[Any]) -> list[tuple[str, float]]:
    calls: list[tuple[str, float]] = []
    for name, module in method.bundle["student"].modules.items():

        def note(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            calls.append((name, round(float(kwargs["timestep"].flatten()[0]), 1)))

        module.register_forward_pre_hook(note, with_kwargs=True)
    return calls


def run_cases(folder: Path, cases: Sequence[ExpertCase]) -> list[Outcome]:
    """Train one case after another in the same processes."""
    with TemporaryDirectory() as out:
        return [trained(folder, case, out) for case in cases]


def _full_array(value: Tensor) -> Any:
    """Return the full tensor as an array, which another process can read after this one ends."""
    value = value.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.numpy().copy()
