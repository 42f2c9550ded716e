"""The critic's weights follow the student's (implicit distribution alignment)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_protocols import ContractError
from distill_runtime import local_shard
from torch import Tensor

from distill_methods.context import MethodContext
from distill_methods.contracts import chunks_of
from distill_methods.distribution_matching.whole_clips import CAUSAL_INTERPOLATION


class CriticInterpolation:
    """``critic <- (1 - l) critic + l student`` after each of the student's updates (implicit
    distribution alignment, IDA: SenseFlow, Ge et al. 2025, arXiv:2506.00523).

    The critic shall have the score of the student's clips, and the student moves under it. A model
    near the student's weights is near in what it predicts, so the critic has less to catch up.

    Of a model of two experts, the critic's expert follows the student's that has stepped. Of LoRA
    roles the factors A and B are interpolated, not their products. The two A are drawn apart, so
    that at first this is no interpolation of weights; B is near zero then, and the factors approach
    each other by l in each update. Of sharded roles each process interpolates its own shards.

    Raises:
        ContractError: the student is causal, or the critic's weights are not those of the student
            in name and shape.
    """

    def __init__(self, context: MethodContext, weight: float) -> None:
        if len(chunks_of(context.adapter, "student")) > 1:
            raise ContractError(CAUSAL_INTERPOLATION.format(f"critic_interpolation: {weight}"))
        self._student, self._critic = context.bundle["student"], context.bundle["critic"]
        self._weight = weight
        for module in self._student.transformers:
            self._check(module)

    @torch.no_grad()
    def after_update(self, stepped: Sequence[str]) -> None:
        """Move the critic where ``stepped``, optimizers as ``role.module``, has the student."""
        for module in self._student.transformers:
            if f"{self._student.name}.{module}" in stepped:
                targets, values = self._pairs(module)
                torch._foreach_lerp_(targets, values, self._weight)

    def _pairs(self, module: str) -> tuple[list[Tensor], list[Tensor]]:
        """Return the critic's trained weights and the student's, in one order."""
        # Looked up each time: a sharded module may exchange the memory of its shards.
        critic = self._critic.trained_parameters(module)
        student = self._student.trained_parameters(module)
        targets = [local_shard(parameter) for parameter in critic.values()]
        # A role that is offloaded waits in host memory, and the other need not.
        values = [
            local_shard(student[name]).to(target)
            for name, target in zip(critic, targets, strict=True)
        ]
        return targets, values

    def _check(self, module: str) -> None:
        if module not in self._critic.modules:
            raise ContractError(
                f"critic_interpolation: the student has {module!r} and the critic has not, so it "
                "cannot follow. Give both the same experts, or leave critic_interpolation out"
            )
        shapes = [
            {n: tuple(local_shard(p).shape) for n, p in role.trained_parameters(module).items()}
            for role in (self._student, self._critic)
        ]
        if shapes[0] != shapes[1]:
            odd = sorted(n for n, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
            raise ContractError(
                f"critic_interpolation: the critic's weights in {module!r} are not the student's: "
                f"{odd[0]!r} is missing or has another shape ({len(set(odd))} such names). Give "
                "both the same model, LoRA and number of processes, or leave "
                "critic_interpolation out"
            )
