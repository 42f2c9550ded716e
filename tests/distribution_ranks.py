"""A small run on any number of processes, to compare all of its numbers with those of one process.

Forked processes import it (``ranks.run_on_ranks``).
"""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from attrs import evolve, field, frozen
from distill_protocols import (
    Callback,
    ContractError,
    DistillError,
    FsdpPolicy,
    ModelBundle,
    RandomStreams,
    RoleHandle,
    RunState,
    StepRecord,
    StepResult,
    derive_seed,
)
from distill_runtime import DistillMethod, Ranks
from distill_trainer import (
    DistillTrainer,
    DistributedConfig,
    Distribution,
    EmaCallback,
    EmaConfig,
    ExponentialMovingAverage,
    GradClipCallback,
    GradClipConfig,
    OptimizerConfig,
    TrainingConfig,
    build_optimizers,
)
from distill_trainer.distribution.tensors import clip_gradients, total_norm
from ranks import CONTEXT, collect_results
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

_EMA = EmaConfig(roles=("student",), decay=0.5)

WIDTH = 5
"""Odd, so that neither two nor four processes get equal shards."""


@frozen(kw_only=True)
class Case:
    """Settings of a run: those that must not change its numbers, and those that choose them."""

    strategy: str | None = None
    shard_size: int | None = None
    sync_every_micro_step: bool = False
    student: FsdpPolicy | None = None
    critic: FsdpPolicy | None = None
    teacher: FsdpPolicy | None = None
    meta: bool = False
    accumulation: int = 1
    turns: str = "alternate"
    """alternate, both (in one iteration) or experts (the last micro step leaves one out)."""
    adapters: bool = False
    precision: str = "fp32"
    name: str = "adamw"
    max_norm: float | None = 0.5
    steps: int = 5
    global_batch: int = 12
    timeout: float = 60.0
    overflow: int | None = None
    """A sample that is too large for fp16 when its loss is scaled."""
    stop_in_call: int | None = None
    """Rank 0 asks for a stop in this call of the step; then the run is started again."""

    def in_one_process(self) -> Case:
        """Return the case without strategy and FSDP policies."""
        plain = dict.fromkeys(("strategy", "shard_size", "student", "critic", "teacher"))
        return evolve(self, meta=False, **plain)


class Block(nn.Module):
    """x + tanh(linear(x)); with adapters, the base is frozen, in bf16."""

    def __init__(self, adapters: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.empty(WIDTH))
        self.down = nn.Parameter(torch.empty(2, WIDTH)) if adapters else None
        self.up = nn.Parameter(torch.empty(WIDTH, 2)) if adapters else None

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(x, self.weight.float(), self.bias.float())
        if self.down is not None and self.up is not None:
            out = out + x @ self.down.T @ self.up.T
        return x + torch.tanh(out)


class Net(nn.Module):
    """Two blocks between two linear layers, and one number for all."""

    def __init__(self, adapters: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(adapters) for _ in range(2)])
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.empty(1))
        self.register_buffer("seen", torch.zeros(1, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.detach().mean()  # another number on each rank
        x = nn.functional.linear(x, self.inner.weight.float(), self.inner.bias.float())
        for block in self.blocks:
            x = block(x)
        x = nn.functional.linear(x, self.outer.weight.float(), self.outer.bias.float())
        return x * self.scale.float()


def named_values(name: str, shape: Sequence[int]) -> Tensor:
    """Return weights that depend on the name and the shape alone, not on the process."""
    generator = torch.Generator().manual_seed(derive_seed(5, name))
    return torch.randn(tuple(shape), generator=generator) / 2


def fill_parameters(role: str, module: nn.Module) -> None:
    """Fill this process's shard of each parameter, as a family does."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for buffer in module.buffers():
            buffer.zero_()
        for name, parameter in module.named_parameters():
            value = named_values(f"{role}.{name}", parameter.shape).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(value)


def build_roles(case: Case, distribution: Distribution) -> ModelBundle:
    """Build a trained student and critic and a frozen teacher, whose blocks are in bf16."""
    handles = {}
    for name in ("student", "critic", "teacher"):
        is_trained = name != "teacher"
        adapters = case.adapters and is_trained
        modules: dict[str, nn.Module] = {}
        experts = case.turns == "experts" and name == "student"
        for key in ("net", "net_2") if experts else ("net",):
            with torch.device("meta"):
                module = Net(adapters)
            for n, p in module.named_parameters():
                if (adapters and not _is_adapter(n)) or (not is_trained and n.startswith("blocks")):
                    p.data = p.data.bfloat16()
            if not case.meta:
                fill_parameters(name + key, module)
            modules[key] = module
        role = RoleHandle(
            name=name,
            modules=modules,
            trainable=is_trained,
            precision=case.precision,  # type: ignore[arg-type]
            blocks=dict.fromkeys(modules, ("blocks.0", "blocks.1")),
            fsdp_policy={"student": case.student, "critic": case.critic, "teacher": case.teacher}[
                name
            ],
            trained={
                key: frozenset(n for n, _ in module.named_parameters() if _is_adapter(n))
                for key, module in modules.items()
            }
            if adapters
            else None,
        )
        distribution.shard(role)
        if case.meta:
            for key, module in modules.items():
                fill_parameters(name + key, module)
        if is_trained:
            # Large eps: where a gradient is nearly 0, Adam makes whole steps of rounding errors.
            optimizer = OptimizerConfig(name=case.name, lr=0.02, eps=1e-3)  # type: ignore[arg-type]
            build_optimizers(role, optimizer, horizon=100, scaled=case.precision == "fp16")
        handles[name] = role
    return ModelBundle(handles)


def _is_adapter(name: str) -> bool:
    return name.endswith(("down", "up"))


class ToyDistillation(DistillMethod[None]):
    """Call modules in every way that a distillation does: without a gradient and then with one,
    through frozen roles that pass a gradient on, in turns or with both losses at once."""

    required_roles = ("student", "critic", "teacher")
    frozen_roles = ("teacher",)
    case = Case()
    calls = 0

    def turn(self, iteration: int) -> str:
        if self.case.turns != "alternate":
            return "both"
        return "student" if iteration % 2 else "critic"

    def get_optimizers(self, iteration: int) -> dict[str, torch.optim.Optimizer]:
        turn = self.turn(iteration)
        return self.optimizers_of(*(("student", "critic") if turn == "both" else (turn,)))

    def call(self, role: str, x: Tensor, key: str = "net") -> Tensor:
        with self.bundle[role].autocast():
            return self.bundle[role].modules[key](x).float()

    def single_train_step(self, batch: Tensor, iteration: int) -> StepResult:
        noise = self.streams.rows("duel.noise", len(batch)).normal((WIDTH,))
        self.calls += 1
        if self.calls == self.case.stop_in_call and self.streams.rank == 0:
            self.stop.request("enough")
        turn, x = self.turn(iteration), batch + noise
        losses: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        ended: list[Tensor] = []
        key = "net"
        if self.case.turns == "experts":
            key, other = "net", "net_2"
            if self.calls % self.case.accumulation == 0:
                key, other = other, key
            # A term with a graph, which is not differentiated.
            extra["other"] = self.call("student", x, other).mean()
        if turn in ("student", "both"):
            with torch.no_grad():
                sample = self.call("student", self.call("student", x, key), key)
            out = self.call("student", x + sample / 4, key)
            with self.bundle["critic"].frozen(), torch.no_grad():
                target = self.call("critic", out) / 2 + self.call("teacher", batch)
            losses["student"] = (out - target).square().mean()
            # The gradient passes through the frozen role and does not reach its weights.
            with self.bundle["critic"].frozen():
                losses["student"] = losses["student"] + self.call("critic", out).square().mean() / 9
            of_turn = {"total_loss": losses["student"], **losses}
            if turn == "both":  # The critic is called again, for a turn of its own.
                of_turn = self.end_turn(of_turn)
            ended.append(of_turn.pop("total_loss"))
            losses = of_turn
        if turn in ("critic", "both"):
            with self.bundle["student"].frozen(), torch.no_grad():
                sample = self.call("student", x, key)
            losses["critic"] = (self.call("critic", sample) - batch).square().mean()
            ended.append(losses["critic"])
        return StepResult({"total_loss": torch.stack(ended).sum(), **losses, **extra}, {})


class StepRecorder(Callback):
    """Record losses and norms, and check that no role has a gradient outside its turn.

    Gradients are measured loss by loss in each iteration, which must not change a number.
    """

    name = "recorder"

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[dict[str, float]] = []
        self.stepped: list[tuple[str, ...]] = []
        self.measured: set[str] = set()

    def on_step_start(self, run: RunState) -> None:
        run.measure_losses = True

    def on_before_optimizer_step(self, run: RunState) -> None:
        stepping = run.method.get_optimizers(run.iteration)
        for key, module in run.method.model_dict.items():
            role = run.method.bundle[key.split(".")[0]]
            for name, parameter in module.named_parameters():
                if key not in stepping or (role.trained and name not in role.trained["net"]):
                    if key.startswith("student") and key not in stepping:
                        assert parameter.grad is None, (key, name, run.iteration)
                    if role.trained and name not in role.trained["net"]:
                        assert parameter.grad is None, (key, name)

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        self.losses.append(step.losses["total_loss"].item())
        norms = {k: v for k, v in step.metrics.items() if k.startswith("grad_norm")}
        assert not any(isinstance(v, DTensor) for v in norms.values())
        self.norms.append({k: float(v) for k, v in norms.items()})
        self.measured |= {k for k in step.metrics if k.startswith("loss_grad_norm")}
        self.stepped.append(step.stepped)


class Data:
    """Yield this process's samples without end: every n-th one, for n processes."""

    def __init__(self, size: int, ranks: Ranks, special: Mapping[int | None, float]) -> None:
        self.size, self.ranks, self.special = size, ranks, special

    def __iter__(self) -> Iterator[Tensor]:
        position = self.ranks.rank
        while True:
            rows = []
            for _ in range(self.size):
                rows.append(
                    named_values(f"sample {position}", (WIDTH,)) * self.special.get(position, 1.0)
                )
                position += self.ranks.size
            yield torch.stack(rows)


@frozen(kw_only=True)
class Outcome:
    """The numbers of a run on this process; weights as full arrays."""

    losses: list[float]
    norms: list[dict[str, float]]
    stepped: list[tuple[str, ...]]
    weights: dict[str, Any]
    buffers: dict[str, Any]
    averages: dict[str, Any]
    measured: frozenset[str] = field(factory=frozenset)
    """Names of gradient norms of single losses."""
    sharded: frozenset[str] = field(factory=frozenset)
    units: frozenset[str] = field(factory=frozenset)
    """Names of the student's modules that FSDP gathers one at a time."""


def full_array(value: Tensor) -> Any:
    """Return the full tensor as an array, which another process can read after this one ends."""
    value = value.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.float().numpy().copy()


def distributed_config(case: Case) -> DistributedConfig:
    return DistributedConfig(
        strategy=case.strategy,  # type: ignore[arg-type]
        shard_size=case.shard_size,
        sync_every_micro_step=case.sync_every_micro_step,
        timeout_seconds=case.timeout,
    )


def build_method(case: Case, distribution: Distribution) -> ToyDistillation:
    ranks = distribution.ranks
    streams = RandomStreams(3, rank=ranks.rank, world_size=ranks.size)
    ToyDistillation.case = case
    return ToyDistillation(build_roles(case, distribution), None, streams=streams)


def run_case(
    case: Case, folder: str, callbacks: Sequence[Callback] = (), poison: int | None = None
) -> Outcome:
    """Train ``case`` on the processes of the current group."""
    with Distribution.start(distributed_config(case), "cpu") as distribution:
        return train(case, folder, distribution, callbacks, poison)


def train(
    case: Case,
    folder: str,
    distribution: Distribution,
    callbacks: Sequence[Callback] = (),
    poison: int | None = None,
) -> Outcome:
    ranks = distribution.ranks
    method, recorder = build_method(case, distribution), StepRecorder()
    training = training_config(case, folder, ranks)
    clip = GradClipCallback(GradClipConfig(max_norm=case.max_norm))
    trainer = DistillTrainer(
        training,
        callbacks=[clip, EmaCallback(_EMA), recorder, *callbacks],
        trackers=(),
        distribution=distribution,
    )
    at_once = training.batch_size_per_device or 0
    data = Data(at_once, ranks, {case.overflow: 300.0, poison: float("nan")})
    result = trainer.run(method, data)
    if result.stop_reason:
        trainer.run(method, data)
    return collect_outcome(method, recorder)


def training_config(case: Case, folder: str, ranks: Ranks) -> TrainingConfig:
    return TrainingConfig(
        output_dir=str(Path(folder) / f"rank-{ranks.rank}"),
        max_train_steps=case.steps,
        global_batch_size=case.global_batch,
        batch_size_per_device=case.global_batch // case.accumulation // ranks.size,
        progress=False,
        trackers=(),
    )


def collect_outcome(method: DistillMethod[Any], recorder: StepRecorder) -> Outcome:
    bundle = method.bundle
    parameters = {
        f"{key}.{name}": p
        for key, m in method.model_dict.items()
        for name, p in m.named_parameters()
    }
    return Outcome(
        losses=recorder.losses,
        norms=recorder.norms,
        stepped=recorder.stepped,
        weights={name: full_array(p) for name, p in parameters.items()},
        buffers={
            f"{key}.{name}": full_array(b)
            for key, m in method.model_dict.items()
            for name, b in m.named_buffers()
        },
        averages={
            f"{key}.{name}": full_array(value)
            for key, ema in bundle.by_module("ema").items()
            for name, value in ema.weights().items()
            if f"{key}.{name}" in parameters
        },
        measured=frozenset(recorder.measured),
        units=frozenset(
            name
            for name, part in next(iter(bundle["student"].modules.values())).named_modules()
            if isinstance(part, FSDPModule)
        ),
        sharded=frozenset(n.split(".")[0] for n, p in parameters.items() if isinstance(p, DTensor)),
    )


def run_cases(cases: Sequence[Case]) -> list[Outcome]:
    """Train one case after another in the same processes."""
    with TemporaryDirectory() as folder:
        return [run_case(case, folder) for case in cases]


def describe_distribution(environment: dict[str, str], case: Case) -> dict[str, Any]:
    """Start a distribution from torchrun's variables and describe it."""
    os.environ.update(environment)
    with Distribution.start(distributed_config(case), "cpu") as distribution:
        description = {
            "rank": distribution.ranks.rank,
            "size": distribution.ranks.size,
            "strategy": distribution.strategy,
            "mesh": None if distribution.mesh is None else tuple(distribution.mesh.shape),
            "device": str(distribution.device),
        }
        distribution.ranks.barrier()  # a process that ends may cut off one that still connects
    assert not distributed.is_initialized(), "the group is destroyed"
    return description


def train_and_kill_rank(environment: dict[str, str], victim: int) -> str:
    """Kill rank ``victim`` in the middle of a step; return the error of the other one."""
    os.environ.update(environment)

    class KillRank(Callback):
        name = "death"

        def on_before_optimizer_step(self, run: RunState) -> None:
            if run.iteration == 2 and run.ranks.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

    case = evolve(Case(), strategy=environment["STRATEGY"])
    try:
        with TemporaryDirectory() as folder:
            run_case(case, folder, [KillRank()])
    except Exception as error:
        assert not distributed.is_initialized()
        return f"{type(error).__name__}: {error}"
    return "no error"


def train_without_other_rank(folder: str) -> tuple[str, float]:
    """Return the error of rank 0 when rank 1 ends before the run begins, and the seconds to it."""
    case = Case(timeout=100.0)
    with Distribution.start(distributed_config(case), "cpu") as distribution:
        if distribution.ranks.rank == 1:
            return "gone", 0.0
        began = time.monotonic()
        try:
            train(case, folder, distribution)
        except DistillError as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "no error", 0.0


def train_in_script(folder: str) -> Outcome:
    """Train as a user's script does that has initialised the process group itself."""
    case = Case(accumulation=3, turns="both")
    with Distribution.adopt(DistributedConfig(), []) as distribution:
        method = build_method(case, distribution)
    # Another start on rank 1, as of a script that set no seed: rank 0's weights must be used.
    if distribution.ranks.rank:
        with torch.no_grad():
            for module in method.model_dict.values():
                for parameter in module.parameters() if module.training else ():
                    parameter.add_(1)
    recorder = StepRecorder()
    ranks = distribution.ranks
    training = training_config(case, folder, ranks)
    clip, ema = GradClipCallback(GradClipConfig(max_norm=0.5)), EmaCallback(_EMA)
    trainer = DistillTrainer(training, callbacks=[clip, ema, recorder], trackers=())
    trainer.run(method, Data(training.batch_size_per_device or 0, ranks, {}))
    assert distributed.is_initialized()
    distributed.barrier()  # the script's group still works
    return collect_outcome(method, recorder)


def adopt_strategy(strategy: str) -> str:
    """Adopt roles that a script has sharded; return the resulting strategy or the error."""
    with Distribution.start(distributed_config(Case(strategy="fsdp2")), "cpu") as distribution:
        modules = build_method(Case(strategy="fsdp2"), distribution).model_dict.values()
        weights = [p for module in modules for p in module.parameters()]
        try:
            config = DistributedConfig(strategy=strategy)  # type: ignore[arg-type]
            with Distribution.adopt(config, weights) as adopted:
                return adopted.strategy
        except DistillError as error:
            return f"{type(error).__name__}: {error}"


def train_on_nan(case: Case, sample: int) -> tuple[str, bool]:
    """Train on a sample that is nan; return the error and whether the weights are still finite."""
    with Distribution.start(distributed_config(case), "cpu") as distribution:
        finite: list[bool] = []

        class Recorder(Callback):
            name = "look"

            def on_exception(self, run: RunState, error: BaseException) -> None:
                modules = run.method.model_dict.values()
                finite.append(
                    all(
                        numpy.isfinite(full_array(p)).all() for m in modules for p in m.parameters()
                    )
                )

        try:
            with TemporaryDirectory() as folder:
                train(case, folder, distribution, [Recorder()], sample)
        except DistillError as error:
            return f"{type(error).__name__}: {error}", finite[0]
        return "no error", True


def policy_errors() -> list[str]:
    """Return the errors of policies that do not fit their role or come too late."""
    messages = []

    def record_error(strategy: str, policy: FsdpPolicy, *, late: bool = False) -> None:
        case = Case(strategy=strategy, student=policy)
        with Distribution.start(distributed_config(case), "cpu") as distribution:
            try:
                bundle = build_roles(case, distribution)
                if late:
                    distribution.shard(bundle["student"])
            except ContractError as error:
                messages.append(str(error))

    record_error("ddp", FsdpPolicy())
    record_error("fsdp2", FsdpPolicy(blocks=("blokcs",)))
    record_error("fsdp2", FsdpPolicy(mixed_precision="bf16"))
    record_error("fsdp2", FsdpPolicy(), late=True)
    with Distribution.start(distributed_config(Case(strategy="fsdp2")), "cpu") as distribution:
        try:
            distribution.shard(RoleHandle(name="teacher", modules={"net": Net()}, offload=True))
        except ContractError as error:
            messages.append(str(error))
    # The other rank may still be connecting to this one for its last group.
    distributed.barrier()
    return messages


def call_with_average(case: Case) -> dict[str, Any]:
    """Return outputs and weights of a sharded model before, during and after the average's use."""
    with Distribution.start(distributed_config(case), "cpu") as distribution:
        bundle = build_roles(case, distribution)
        net = bundle["student"].modules["net"]
        x = torch.ones(2, WIDTH)
        average = ExponentialMovingAverage(net, 0.5)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(3)
        average.update(net)
        before = {name: full_array(p) for name, p in net.named_parameters()}
        with torch.no_grad():
            live = net(x).numpy().copy()  # may leave gathered weights behind
            with average.swapped_in(net):
                mean = net(x).numpy().copy()
            restored = net(x).numpy().copy()
        for part in net.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        after = {name: full_array(p) for name, p in net.named_parameters()}
        return {"live": live, "mean": mean, "again": restored, "before": before, "after": after}


def launch(target: Any, *args: Any, size: int, **variables: str) -> list[Any]:
    """Run ``target(environment, *args)`` on ``size`` processes with torchrun's variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, children = [], []
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **variables,
        }
        receiver, sender = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=_run_child, args=(sender, target, environment, args))
        child.start()
        sender.close()
        pipes.append(receiver)
        children.append(child)
    return collect_results(children, pipes)


def _run_child(pipe: Any, target: Any, environment: dict[str, str], args: Any) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(target(environment, *args))
    except BaseException:
        pipe.send(traceback.format_exc())
    os._exit(0)


def gradients_of_micro_steps(case: Case) -> list[list[float]]:
    """Return the sum of each of the student's gradients after each of two micro steps."""
    with Distribution.start(distributed_config(case), "cpu") as distribution:
        method = build_method(case, distribution)
        distribution.prepare(method)
        data = iter(Data(2, distribution.ranks, {}))
        sums = []
        for last in (False, True):
            with distribution.micro_step(method, 1, last=last):
                method.single_train_step(next(data), 1).loss_map["total_loss"].backward()
            parameters = method.model_dict["student.net"].parameters()
            gradients = [p.grad for p in parameters if p.grad is not None]
            sums.append([float(full_array(gradient).sum()) for gradient in gradients])
        return sums


def error_of_streams(rank: int) -> str:
    """Train with the ``RandomStreams`` of ``rank`` on every rank; return the error, or ""."""
    case = Case()
    with (
        TemporaryDirectory() as folder,
        Distribution.start(distributed_config(case), "cpu") as distribution,
    ):
        method = PartialGradients(
            build_roles(case, distribution), None, streams=RandomStreams(3, rank=rank, world_size=2)
        )
        training = training_config(case, folder, distribution.ranks)
        trainer = DistillTrainer(training, trackers=(), distribution=distribution)
        try:
            trainer.run(method, Data(training.batch_size_per_device or 0, distribution.ranks, {}))
        except DistillError as error:
            return f"{type(error).__name__}: {error}"
    return ""


class PartialGradients(DistillMethod[None]):
    """Train all of the critic in its own turn and one layer of it in the student's.

    With ``apart`` the turns are exchanged: the student's loss reaches all of the critic, which
    does not step then.
    """

    required_roles = ("student", "critic")
    apart = False

    def get_optimizers(self, iteration: int) -> dict[str, torch.optim.Optimizer]:
        if iteration % 2:
            return self.optimizers_of("critic")
        return (
            self.optimizers_of("student") if self.apart else self.optimizers_of("student", "critic")
        )

    def single_train_step(self, batch: Tensor, iteration: int) -> StepResult:
        student, critic = (self.bundle[n].modules["net"] for n in ("student", "critic"))
        both = critic.outer(torch.tanh(critic.inner(batch))).square().mean()
        half = critic.outer(batch).square().mean()
        own = student.inner(batch).square().mean()
        if self.apart:
            return StepResult({"total_loss": half if iteration % 2 else own + both}, {})
        return StepResult({"total_loss": both if iteration % 2 else own + half}, {})


def train_partial_gradients(apart: bool, accumulation: int) -> tuple[Outcome, list[list[str]]]:
    """Train; also return which of the critic's weights had a gradient in each iteration."""
    case = Case(accumulation=accumulation, max_norm=None)
    reached: list[list[str]] = []

    class Recorder(StepRecorder):
        def on_before_optimizer_step(self, run: RunState) -> None:
            named = run.method.model_dict["critic.net"].named_parameters()
            reached.append([name for name, p in named if p.grad is not None])

    with (
        TemporaryDirectory() as folder,
        Distribution.start(distributed_config(case), "cpu") as distribution,
    ):
        bundle = build_roles(case, distribution)
        streams = RandomStreams(3, rank=distribution.ranks.rank, world_size=distribution.ranks.size)
        method, recorder = PartialGradients(bundle, None, streams=streams), Recorder()
        method.apart = apart
        training = training_config(case, folder, distribution.ranks)
        trainer = DistillTrainer(
            training, callbacks=[recorder], trackers=(), distribution=distribution
        )
        trainer.run(method, Data(training.batch_size_per_device or 0, distribution.ranks, {}))
        return collect_outcome(method, recorder), reached


def clip_mixed_gradients() -> tuple[float, float, list[float]]:
    """Return the norm of a sharded and a full gradient together, the expected norm, and all
    values after clipping to 1."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    tensors = [named_values("part", (5, 3)), named_values("whole", (7,))]
    full = nn.Parameter(torch.zeros(7))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]))
    sharded.grad, full.grad = distribute_tensor(tensors[0], mesh, [Shard(0)]), tensors[1].clone()
    norm = total_norm([sharded.grad, full.grad])
    clip_gradients([sharded, full], 1.0, norm)
    clipped = [*full_array(sharded.grad).flatten().tolist(), *full.grad.tolist()]
    expected = torch.cat([t.flatten() for t in tensors]).norm()
    return norm.item(), expected.item(), clipped
