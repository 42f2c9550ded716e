"""A small run on any number of processes, of which all numbers can be compared with one process's.

Importable by forked processes (``ranks.together``).
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
from ranks import CONTEXT, _results
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

_EMA = EmaConfig(roles=("student",), decay=0.5)

WIDTH = 5
"""Neither two nor four processes get equal parts of it."""


@frozen(kw_only=True)
class Case:
    """What may differ between two runs that shall give the same numbers, and what they are of."""

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

    def alone(self) -> Case:
        """In one process."""
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


def values(name: str, shape: Sequence[int]) -> Tensor:
    """The weights of that name, whatever process asks."""
    generator = torch.Generator().manual_seed(derive_seed(5, name))
    return torch.randn(tuple(shape), generator=generator) / 2


def fill(role: str, module: nn.Module) -> None:
    """As a family does: this process's own part of each parameter."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for buffer in module.buffers():
            buffer.zero_()
        for name, parameter in module.named_parameters():
            value = values(f"{role}.{name}", parameter.shape).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(value)


def roles(case: Case, distribution: Distribution) -> ModelBundle:
    """student and critic learn; the teacher is frozen, partly in 16 bits."""
    found = {}
    for name in ("student", "critic", "teacher"):
        learns = name != "teacher"
        adapters = case.adapters and learns
        modules: dict[str, nn.Module] = {}
        experts = case.turns == "experts" and name == "student"
        for key in ("net", "net_2") if experts else ("net",):
            with torch.device("meta"):
                module = Net(adapters)
            for n, p in module.named_parameters():
                if (adapters and not _is_adapter(n)) or (not learns and n.startswith("blocks")):
                    p.data = p.data.bfloat16()
            if not case.meta:
                fill(name + key, module)
            modules[key] = module
        role = RoleHandle(
            name=name,
            modules=modules,
            trainable=learns,
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
                fill(name + key, module)
        if learns:
            # Large eps: where a gradient is nearly 0, Adam makes whole steps of rounding errors.
            optimizer = OptimizerConfig(name=case.name, lr=0.02, eps=1e-3)  # type: ignore[arg-type]
            build_optimizers(role, optimizer, horizon=100, scaled=case.precision == "fp16")
        found[name] = role
    return ModelBundle(found)


def _is_adapter(name: str) -> bool:
    return name.endswith(("down", "up"))


class Duel(DistillMethod[None]):
    """Everything that a distillation does to its modules: calls without gradient and then one with
    it, frozen roles that pass a gradient on, turns or both losses at once."""

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
        shown: dict[str, Tensor] = {}
        key = "net"
        if self.case.turns == "experts":
            key, other = "net", "net_2"
            if self.calls % self.case.accumulation == 0:
                key, other = other, key
            # A term with a graph, which is not differentiated.
            shown["other"] = self.call("student", x, other).mean()
        if turn in ("student", "both"):
            with torch.no_grad():
                seen = self.call("student", self.call("student", x, key), key)
            out = self.call("student", x + seen / 4, key)
            with self.bundle["critic"].frozen(), torch.no_grad():
                target = self.call("critic", out) / 2 + self.call("teacher", batch)
            losses["student"] = (out - target).square().mean()
            # Through a frozen role, not into it.
            with self.bundle["critic"].frozen():
                losses["student"] = losses["student"] + self.call("critic", out).square().mean() / 9
        if turn in ("critic", "both"):
            with self.bundle["student"].frozen(), torch.no_grad():
                seen = self.call("student", x, key)
            losses["critic"] = (self.call("critic", seen) - batch).square().mean()
        return StepResult({"total_loss": sum(losses.values()), **losses, **shown}, {})  # type: ignore[dict-item]


class Watch(Callback):
    """Losses and norms as they come; and that nobody has a gradient out of turn."""

    name = "watch"

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[dict[str, float]] = []
        self.stepped: list[tuple[str, ...]] = []

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
        self.stepped.append(step.stepped)


class Data:
    """This process's samples, of all that there are every so-many-th; without end."""

    def __init__(self, size: int, ranks: Ranks, special: Mapping[int | None, float]) -> None:
        self.size, self.ranks, self.special = size, ranks, special

    def __iter__(self) -> Iterator[Tensor]:
        place = self.ranks.rank
        while True:
            rows = []
            for _ in range(self.size):
                rows.append(values(f"sample {place}", (WIDTH,)) * self.special.get(place, 1.0))
                place += self.ranks.size
            yield torch.stack(rows)


@frozen(kw_only=True)
class Outcome:
    """Of a run on this process; weights as whole arrays."""

    losses: list[float]
    norms: list[dict[str, float]]
    stepped: list[tuple[str, ...]]
    weights: dict[str, Any]
    buffers: dict[str, Any]
    averages: dict[str, Any]
    sharded: frozenset[str] = field(factory=frozenset)
    units: frozenset[str] = field(factory=frozenset)
    """What is gathered at a time, of the student."""


def whole(value: Tensor) -> Any:
    """As an array: a tensor that another process reads needs its sender alive."""
    value = value.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.float().numpy().copy()


def config_of(case: Case) -> DistributedConfig:
    return DistributedConfig(
        strategy=case.strategy,  # type: ignore[arg-type]
        shard_size=case.shard_size,
        sync_every_micro_step=case.sync_every_micro_step,
        timeout_seconds=case.timeout,
    )


def method_of(case: Case, distribution: Distribution) -> Duel:
    ranks = distribution.ranks
    streams = RandomStreams(3, rank=ranks.rank, world_size=ranks.size)
    Duel.case = case
    return Duel(roles(case, distribution), None, streams=streams)


def trained(
    case: Case, folder: str, callbacks: Sequence[Callback] = (), poison: int | None = None
) -> Outcome:
    """What comes of ``case`` on the processes that are there."""
    with Distribution.start(config_of(case), "cpu") as distribution:
        return train(case, folder, distribution, callbacks, poison)


def train(
    case: Case,
    folder: str,
    distribution: Distribution,
    callbacks: Sequence[Callback] = (),
    poison: int | None = None,
) -> Outcome:
    ranks = distribution.ranks
    method, watch = method_of(case, distribution), Watch()
    training = training_of(case, folder, ranks)
    clip = GradClipCallback(GradClipConfig(max_norm=case.max_norm))
    trainer = DistillTrainer(
        training,
        callbacks=[clip, EmaCallback(_EMA), watch, *callbacks],
        trackers=(),
        distribution=distribution,
    )
    at_once = training.batch_size_per_device or 0
    data = Data(at_once, ranks, {case.overflow: 300.0, poison: float("nan")})
    result = trainer.run(method, data)
    if result.stop_reason:
        trainer.run(method, data)
    return outcome(method, watch)


def training_of(case: Case, folder: str, ranks: Ranks) -> TrainingConfig:
    return TrainingConfig(
        output_dir=str(Path(folder) / f"rank-{ranks.rank}"),
        max_train_steps=case.steps,
        global_batch_size=case.global_batch,
        batch_size_per_device=case.global_batch // case.accumulation // ranks.size,
        progress=False,
        trackers=(),
    )


def outcome(method: DistillMethod[Any], watch: Watch) -> Outcome:
    bundle = method.bundle
    parameters = {
        f"{key}.{name}": p
        for key, m in method.model_dict.items()
        for name, p in m.named_parameters()
    }
    return Outcome(
        losses=watch.losses,
        norms=watch.norms,
        stepped=watch.stepped,
        weights={name: whole(p) for name, p in parameters.items()},
        buffers={
            f"{key}.{name}": whole(b)
            for key, m in method.model_dict.items()
            for name, b in m.named_buffers()
        },
        averages={
            f"{key}.{name}": whole(value)
            for key, ema in bundle.by_module("ema").items()
            for name, value in ema.weights().items()
            if f"{key}.{name}" in parameters
        },
        units=frozenset(
            name
            for name, part in next(iter(bundle["student"].modules.values())).named_modules()
            if isinstance(part, FSDPModule)
        ),
        sharded=frozenset(n.split(".")[0] for n, p in parameters.items() if isinstance(p, DTensor)),
    )


def all_trained(cases: Sequence[Case]) -> list[Outcome]:
    """One after the other, in these processes."""
    with TemporaryDirectory() as folder:
        return [trained(case, folder) for case in cases]


def met(environment: dict[str, str], case: Case) -> dict[str, Any]:
    """As torchrun starts it: in a process without a group, with these variables."""
    os.environ.update(environment)
    with Distribution.start(config_of(case), "cpu") as distribution:
        found = {
            "rank": distribution.ranks.rank,
            "size": distribution.ranks.size,
            "strategy": distribution.strategy,
            "mesh": None if distribution.mesh is None else tuple(distribution.mesh.shape),
            "device": str(distribution.device),
        }
        distribution.ranks.barrier()  # a process that ends may cut off one that still connects
    assert not distributed.is_initialized(), "it leaves nothing behind"
    return found


def lost(environment: dict[str, str], victim: int) -> str:
    """What a process says when another dies in the middle of a step, and how it ends."""
    os.environ.update(environment)

    class Death(Callback):
        name = "death"

        def on_before_optimizer_step(self, run: RunState) -> None:
            if run.iteration == 2 and run.ranks.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

    case = evolve(Case(), strategy=environment["STRATEGY"])
    try:
        with TemporaryDirectory() as folder:
            trained(case, folder, [Death()])
    except Exception as error:
        assert not distributed.is_initialized()
        return f"{type(error).__name__}: {error}"
    return "it went on"


def left_alone(folder: str) -> tuple[str, float]:
    """What this rank says of one that is gone before the run begins; and the seconds."""
    case = Case(timeout=100.0)
    with Distribution.start(config_of(case), "cpu") as distribution:
        if distribution.ranks.rank == 1:
            return "gone", 0.0
        began = time.monotonic()
        try:
            train(case, folder, distribution)
        except DistillError as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "it went on", 0.0


def in_a_script(folder: str) -> Outcome:
    """A script of somebody's own: it brought the processes together, and the trainer finds them."""
    case = Case(accumulation=3, turns="both")
    with Distribution.adopt(DistributedConfig(), []) as distribution:
        method = method_of(case, distribution)
    if distribution.ranks.rank:  # as seeds do that a script forgot: rank 0's count
        with torch.no_grad():
            for module in method.model_dict.values():
                for parameter in module.parameters() if module.training else ():
                    parameter.add_(1)
    watch = Watch()
    ranks = distribution.ranks
    training = training_of(case, folder, ranks)
    clip, ema = GradClipCallback(GradClipConfig(max_norm=0.5)), EmaCallback(_EMA)
    trainer = DistillTrainer(training, callbacks=[clip, ema, watch], trackers=())
    trainer.run(method, Data(training.batch_size_per_device or 0, ranks, {}))
    assert distributed.is_initialized()
    distributed.barrier()  # the group is theirs, and works
    return outcome(method, watch)


def found_with(strategy: str) -> str:
    """What is found for ``strategy`` where a script has sharded its roles, or what is said."""
    with Distribution.start(config_of(Case(strategy="fsdp2")), "cpu") as distribution:
        modules = method_of(Case(strategy="fsdp2"), distribution).model_dict.values()
        weights = [p for module in modules for p in module.parameters()]
        try:
            config = DistributedConfig(strategy=strategy)  # type: ignore[arg-type]
            with Distribution.adopt(config, weights) as found:
                return found.strategy
        except DistillError as error:
            return f"{type(error).__name__}: {error}"


def poisoned(case: Case, sample: int) -> tuple[str, bool]:
    """What this rank says of a sample that is nan, and whether weights are finite still."""
    with Distribution.start(config_of(case), "cpu") as distribution:
        found: list[bool] = []

        class Look(Callback):
            name = "look"

            def on_exception(self, run: RunState, error: BaseException) -> None:
                modules = run.method.model_dict.values()
                found.append(
                    all(numpy.isfinite(whole(p)).all() for m in modules for p in m.parameters())
                )

        try:
            with TemporaryDirectory() as folder:
                train(case, folder, distribution, [Look()], sample)
        except DistillError as error:
            return f"{type(error).__name__}: {error}", found[0]
        return "nothing", True


def refused() -> list[str]:
    """Policies that fit no role, or come too late."""
    said = []

    def ask(strategy: str, policy: FsdpPolicy, *, late: bool = False) -> None:
        case = Case(strategy=strategy, student=policy)
        with Distribution.start(config_of(case), "cpu") as distribution:
            try:
                bundle = roles(case, distribution)
                if late:
                    distribution.shard(bundle["student"])
            except ContractError as error:
                said.append(str(error))

    ask("ddp", FsdpPolicy())
    ask("fsdp2", FsdpPolicy(blocks=("blokcs",)))
    ask("fsdp2", FsdpPolicy(mixed_precision="bf16"))
    ask("fsdp2", FsdpPolicy(), late=True)
    with Distribution.start(config_of(Case(strategy="fsdp2")), "cpu") as distribution:
        try:
            distribution.shard(RoleHandle(name="teacher", modules={"net": Net()}, offload=True))
        except ContractError as error:
            said.append(str(error))
    # The other rank may still be connecting to this one for its last group.
    distributed.barrier()
    return said


def swapped(case: Case) -> dict[str, Any]:
    """What a sharded model says with its average, and with its own weights again."""
    with Distribution.start(config_of(case), "cpu") as distribution:
        bundle = roles(case, distribution)
        net = bundle["student"].modules["net"]
        x = torch.ones(2, WIDTH)
        average = ExponentialMovingAverage(net, 0.5)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(3)
        average.update(net)
        before = {name: whole(p) for name, p in net.named_parameters()}
        with torch.no_grad():
            live = net(x).numpy().copy()  # may leave gathered weights behind
            with average.swapped_in(net):
                mean = net(x).numpy().copy()
            again = net(x).numpy().copy()
        for part in net.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        after = {name: whole(p) for name, p in net.named_parameters()}
        return {"live": live, "mean": mean, "again": again, "before": before, "after": after}


def launched(target: Any, *args: Any, size: int, **variables: str) -> list[Any]:
    """``target(environment, *args)`` on ``size`` processes that torchrun might have started."""
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
        ours, theirs = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=_bare, args=(theirs, target, environment, args))
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    return _results(children, pipes)


def _bare(pipe: Any, target: Any, environment: dict[str, str], args: Any) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(target(environment, *args))
    except BaseException:
        pipe.send(traceback.format_exc())
    os._exit(0)


def waiting(case: Case) -> list[list[float]]:
    """The student's gradients (norm of this rank's) after each of two micro steps."""
    with Distribution.start(config_of(case), "cpu") as distribution:
        method = method_of(case, distribution)
        step = distribution.prepare_step(method)
        data = iter(Data(2, distribution.ranks, {}))
        found = []
        for last in (False, True):
            with distribution.micro_step(method, last=last):
                step(next(data), 1).loss_map["total_loss"].backward()
            parameters = method.model_dict["student.net"].parameters()
            gradients = [p.grad for p in parameters if p.grad is not None]
            found.append([float(whole(gradient).sum()) for gradient in gradients])
        return found


def with_streams_of(rank: int) -> str:
    """What a run says to streams of ``rank`` on all of its ranks."""
    case = Case()
    with TemporaryDirectory() as folder, Distribution.start(config_of(case), "cpu") as found:
        method = Halves(roles(case, found), None, streams=RandomStreams(3, rank=rank, world_size=2))
        training = training_of(case, folder, found.ranks)
        trainer = DistillTrainer(training, trackers=(), distribution=found)
        try:
            trainer.run(method, Data(training.batch_size_per_device or 0, found.ranks, {}))
        except DistillError as error:
            return f"{type(error).__name__}: {error}"
    return ""


class Halves(DistillMethod[None]):
    """The critic learns alone, all of it, and with the student, one half of it; or, out of turn,
    the student's loss reaches all of it."""

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


def halves(apart: bool, accumulation: int) -> tuple[Outcome, list[list[str]]]:
    """What comes of it, and which of the critic's weights had a gradient in each iteration."""
    case = Case(accumulation=accumulation, max_norm=None)
    reached: list[list[str]] = []

    class Look(Watch):
        def on_before_optimizer_step(self, run: RunState) -> None:
            named = run.method.model_dict["critic.net"].named_parameters()
            reached.append([name for name, p in named if p.grad is not None])

    with TemporaryDirectory() as folder, Distribution.start(config_of(case), "cpu") as found:
        bundle = roles(case, found)
        streams = RandomStreams(3, rank=found.ranks.rank, world_size=found.ranks.size)
        method, watch = Halves(bundle, None, streams=streams), Look()
        method.apart = apart
        training = training_of(case, folder, found.ranks)
        trainer = DistillTrainer(training, callbacks=[watch], trackers=(), distribution=found)
        trainer.run(method, Data(training.batch_size_per_device or 0, found.ranks, {}))
        return outcome(method, watch), reached


def mixed_norms() -> tuple[float, float, list[float]]:
    """Norm of a part and a whole together, what it should be, and all values once clipped to 1."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    tensors = [values("part", (5, 3)), values("whole", (7,))]
    wide = nn.Parameter(torch.zeros(7))
    part = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]))
    part.grad, wide.grad = distribute_tensor(tensors[0], mesh, [Shard(0)]), tensors[1].clone()
    norm = total_norm([part.grad, wide.grad])
    clip_gradients([part, wide], 1.0, norm)
    clipped = [*whole(part.grad).flatten().tolist(), *wide.grad.tolist()]
    expected = torch.cat([t.flatten() for t in tensors]).norm()
    return norm.item(), expected.item(), clipped
