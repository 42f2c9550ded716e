"""diffusers' own Wan under each strategy; a module of its own, since its import takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import evolve, frozen
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_protocols import FsdpPolicy, ModelBundle, RandomStreams, RoleHandle, StepResult
from distill_runtime import DistillMethod
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
from distribution_ranks import Outcome, StepRecorder, collect_outcome, named_values
from torch import Tensor

SHAPE = (4, 1, 4, 4)
TEXT = (3, 6)


@frozen(kw_only=True)
class WanCase:
    strategy: str | None = None
    checkpointing: bool = False
    accumulation: int = 1
    precision: str = "fp32"
    mixed: str | None = None

    def in_one_process(self) -> WanCase:
        return evolve(self, strategy=None, mixed=None)


def wan(name: str) -> WanTransformer3DModel:
    """Build a tiny model whose weights depend on ``name`` alone."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=6, freq_dim=8, ffn_dim=20, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(named_values(f"{name}.{key}", parameter.shape) / 2)
    return model


class Follow(DistillMethod[None]):
    """Train the student towards the teacher on the result of one of its own calls."""

    def call(self, role: str, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        module = self.bundle[role].modules["transformer"]
        with self.bundle[role].autocast():
            return module(
                hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False
            )[0].float()

    def single_train_step(self, batch: Tensor, iteration: int) -> StepResult:
        rows = self.streams.rows("follow", len(batch))
        x, text, t = rows.normal(SHAPE), rows.normal(TEXT), 1000 * rows.uniform()
        with torch.no_grad():
            x = x - 0.1 * self.call("student", x, t, text)
            target = self.call("teacher", x, t, text)
        loss = (self.call("student", x, t, text) - target).square().mean()
        return StepResult({"total_loss": loss}, {})

    def get_optimizers(self, iteration: int) -> dict[str, torch.optim.Optimizer]:
        return self.optimizers_of("student")


def run_case(case: WanCase, folder: str) -> Outcome:
    config = DistributedConfig(strategy=case.strategy, timeout_seconds=60.0)  # type: ignore[arg-type]
    with Distribution.start(config, "cpu") as distribution:
        ranks = distribution.ranks
        handles = {}
        for name in ("student", "teacher"):
            module = wan(name)
            if name == "student" and case.checkpointing:
                module.enable_gradient_checkpointing()
            if name == "teacher":  # 16 bits, but for what diffusers keeps wide
                wide = set(module._keep_in_fp32_modules or ())  # type: ignore[arg-type]
                for key, parameter in module.named_parameters():
                    if not wide & set(key.split(".")):
                        parameter.data = parameter.data.bfloat16()
            role = RoleHandle(
                name=name,
                modules={"transformer": module},
                trainable=name == "student",
                precision=case.precision if name == "student" else "bf16",  # type: ignore[arg-type]
                blocks={"transformer": ("blocks.0", "blocks.1")},
                fsdp_policy=FsdpPolicy(mixed_precision=case.mixed)  # type: ignore[arg-type]
                if name == "student" and case.strategy == "fsdp2"
                else None,
            )
            distribution.shard(role)
            handles[name] = role
        build_optimizers(handles["student"], OptimizerConfig(lr=0.01, eps=1e-3), horizon=10)
        streams = RandomStreams(1, rank=ranks.rank, world_size=ranks.size)
        method, recorder = Follow(ModelBundle(handles), None, streams=streams), StepRecorder()
        at_once = 12 // case.accumulation // ranks.size
        training = TrainingConfig(
            output_dir=str(Path(folder) / f"rank-{ranks.rank}"), max_train_steps=3, trackers=(),
            global_batch_size=12, batch_size_per_device=at_once, progress=False,
        )  # fmt: skip
        clip = GradClipCallback(GradClipConfig(max_norm=0.2))
        trainer = DistillTrainer(training, callbacks=[clip, recorder], distribution=distribution)
        trainer.run(method, [torch.zeros(at_once)])
        return collect_outcome(method, recorder)


def run_cases(cases: Sequence[WanCase]) -> list[Any]:
    """Train one case after another in the same processes."""
    with TemporaryDirectory() as folder:
        return [run_case(case, folder) for case in cases]
