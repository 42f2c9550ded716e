"""LoRA roles under real methods: adapters alone move and are averaged, and resume is exact."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from attrs import frozen
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_diffusers.lora import is_adapter
from distill_methods import DMD2Config, DMD2Method, FinetuneConfig, FinetuneMethod
from distill_protocols import (
    Batch,
    Callback,
    Condition,
    LoraSpec,
    RandomStreams,
    RoleSpec,
    SamplerSpec,
    derive_seed,
)
from distill_runtime import DistillMethod
from distill_trainer import DistillTrainer, EmaCallback, EmaConfig, TrainingConfig
from distill_trainer.config import OptimizerConfig
from distill_trainer.optimizers import build_optimizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

FOLDER = str(Path(__file__).resolve().parents[2] / "configs/tiny/wan")
PIPELINE = WanPipelineConfig(num_frames=9, height=32, width=32, max_sequence_length=8)


class Loader:
    """Batches that are functions of the position."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(derive_seed(3, self.position))
            self.position += 1
            yield Batch(
                latents=torch.randn(2, 8, 3, 4, 4, generator=generator),
                cond=Condition({"text": torch.randn(2, 8, 64, generator=generator)}),
                ids=("a", "b"),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]


class Conditioning:
    def negative(self) -> Condition:
        return Condition({"text": torch.full((1, 8, 64), 0.3)})


@frozen(kw_only=True)
class Shape:
    """What may differ between two runs."""

    method: str = "dmd2"
    precision: str = "fp32"
    rank: int = 2
    targets: tuple[str, ...] = ()
    accumulation: int = 1
    interval: int = 2


class Run:
    """Student and critic are LoRAs over one folder; the teacher is that folder."""

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        lora = LoraSpec(rank=shape.rank, alpha=4, target_modules=shape.targets)
        names = ("student", "teacher", "critic") if shape.method == "dmd2" else ("student",)
        specs = [
            RoleSpec(
                name=name, path=FOLDER, trainable=name != "teacher", precision=shape.precision,
                lora=None if name == "teacher" else lora,
            )
            for name in names
        ]  # fmt: skip
        self.shape = shape
        self.bundle = PLUGIN.load(specs, PIPELINE, device=torch.device("cpu"), seed=seed)
        for role in self.bundle.roles.values():
            if role.trainable:
                build_optimizers(role, OptimizerConfig(lr=1e-2), horizon=20)
        adapter = PLUGIN.adapter(self.bundle, PIPELINE, source=FOLDER)
        spec = SamplerSpec(steps=2, shift=3.0, stochastic=True)
        parts = {"conditioning": Conditioning(), "streams": RandomStreams(7)}
        self.method: DistillMethod[Any] = (
            DMD2Method(
                self.bundle, adapter,
                DMD2Config(generator_update_interval=shape.interval, student_sampler=spec), **parts,
            )
            if shape.method == "dmd2"
            else FinetuneMethod(self.bundle, adapter, FinetuneConfig(student_sampler=spec), **parts)
        )  # fmt: skip
        self.loader = Loader()
        self.callbacks: dict[str, Callback] = {
            "ema": EmaCallback(EmaConfig(roles=("student",), decay=0.5))
        }

    def train(self, folder: Path, steps: int, config: CheckpointConfig | None = None) -> None:
        training = TrainingConfig(
            output_dir=str(folder), max_train_steps=steps, progress=False, trackers=(),
            global_batch_size=2 * self.shape.accumulation, batch_size_per_device=2,
        )  # fmt: skip
        manager = config and CheckpointManager(config, folder, {"a": 1})
        DistillTrainer(
            training, callbacks=list(self.callbacks.values()), trackers=(), checkpointer=manager
        ).run(self.method, self.loader)

    def base(self) -> dict[str, Tensor]:
        return {
            f"{key}.{name}": value.clone()
            for key, module in self.bundle.by_module("modules").items()
            for name, value in module.state_dict().items()
            if not is_adapter(name)
        }

    def moving(self) -> dict[str, Any]:
        """Everything that a step changes."""
        roles = self.bundle.roles
        states = {
            "weights": {name: roles[name].moving_state("transformer") for name in roles},
            "optimizers": self.bundle.by_module("optimizers"),
            "schedulers": self.bundle.by_module("schedulers"),
            "ema": self.bundle.by_module("ema"),
        }
        return {
            **{k: _values(v) for k, v in states.items()},
            "method": self.method.state_dict(),
            "streams": self.method.streams.state_dict(),
            "loader": self.loader.state_dict(),
        }


def _values(table: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, dict) else v.state_dict() for k, v in table.items()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


shapes = st.builds(
    Shape,
    method=st.sampled_from(["dmd2", "finetune"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    rank=st.integers(1, 4),
    targets=st.sampled_from([(), ("to_q", "ffn.net.2"), ("time_proj", "attn2.to_out.0")]),
    accumulation=st.integers(1, 2),
    interval=st.integers(2, 3),
)


@settings(max_examples=2)
@given(shape=shapes)
@example(shape=Shape(precision="bf16"))
def test_adapters_alone_move_and_are_averaged(shape):
    run = Run(shape)
    base, start = run.base(), {k: v.clone() for k, v in _moving(run).items()}
    with TemporaryDirectory() as folder:
        run.train(Path(folder), 3)
    assert same(base, run.base())
    for key, value in _moving(run).items():
        assert value.grad is None, key  # the trainer drops them
        # One step of two moves only B where B was 0: A's gradient is s B^T dW.
        if ".lora_B." in key:
            assert not torch.equal(start[key], value), key
    student = run.bundle["student"]
    for role in run.bundle.roles.values():
        role.check_training()
    averaged = student.ema["transformer"].weights()
    assert averaged.keys() == student.moving_state("transformer").keys()
    assert any(not torch.equal(v, averaged[k]) for k, v in _moving_of(student).items())
    kept = {k: v.clone() for k, v in _moving_of(student).items()}
    with student.averaged():
        assert same(dict(_moving_of(student)), dict(averaged))
        assert same(base, run.base())
    assert same(kept, dict(_moving_of(student)))


def _moving_of(role) -> dict[str, Tensor]:
    return role.trained_parameters("transformer")


def _moving(run: Run) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, role in run.bundle.roles.items()
        for key, value in _moving_of(role).items()
    }


@settings(max_examples=3)
@given(shape=shapes, n=st.integers(1, 2), m=st.integers(1, 2))
@example(shape=Shape(precision="bf16"), n=2, m=2)
def test_n_steps_save_load_m_steps_is_n_plus_m_steps(shape, n, m):
    with TemporaryDirectory() as name:
        full = Run(shape)
        full.train(Path(name), n + m)
        Run(shape).train(Path(name), n, CheckpointConfig())
        # Other adapters before the resume: all of them must be overwritten.
        resumed = Run(shape, seed=1)
        resumed.train(Path(name), n + m, CheckpointConfig(resume="latest"))
        assert same(full.moving(), resumed.moving())
        assert same(full.base(), resumed.base())


@pytest.mark.parametrize("ema", [False, True])
def test_a_trained_lora_warm_starts_another_role(tmp_path, ema):
    run = Run(Shape())
    run.train(tmp_path, 3)
    spec = RoleSpec(name="other", path=FOLDER, trainable=True, lora=LoraSpec(rank=2, alpha=4))
    student = run.bundle["student"]
    sources = {"other": student.weight_sources(ema=ema)}
    other = PLUGIN.load([spec], PIPELINE, device=torch.device("cpu"), weights=sources)["other"]
    with student.averaged(ema=ema):
        assert same(dict(_moving_of(other)), dict(_moving_of(student)))
