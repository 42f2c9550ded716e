"""What stands in for method, adapter and texts in reports of tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from distill_evaluation.judge import Judge
from distill_protocols import Capabilities, Condition, SamplerSpec
from distill_runtime import DistillMethod
from torch import Tensor

CPU = torch.device("cpu")
JUDGE = Path(__file__).resolve().parents[1] / "configs" / "tiny" / "judge"


class Method(DistillMethod[None]):
    def single_train_step(self, batch: Any, iteration: int) -> Any:
        raise NotImplementedError

    def get_optimizers(self, iteration: int) -> Any:
        raise NotImplementedError

    @property
    def sampler_spec(self) -> SamplerSpec:
        return SamplerSpec(steps=2)


class Adapter:
    """Latents are pixels; a sample is its noise. Counts what it was asked to do."""

    capabilities = Capabilities()

    def __init__(self) -> None:
        judge = Judge.load(JUDGE).network.config
        self.latent_shape = (3, judge.frames, judge.height, judge.width)
        self.done: list[str] = []

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return (latents - 1) / 2

    def decode(self, latents: Tensor) -> Tensor:
        self.done.append("decode")
        return torch.sigmoid(latents)

    def sample(
        self, role: str, spec: SamplerSpec, noise: Tensor, cond: Condition, *,
        poll: Callable[[], None], **_: Any,
    ) -> Tensor:  # fmt: skip
        for _ in range(spec.steps):
            poll()
            self.done.append("call")
        return noise


class Conditioning:
    def encode(self, prompts: Sequence[str], images: object = None) -> Condition:
        return Condition({"text": torch.zeros(len(prompts), 1)})
