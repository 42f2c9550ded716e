"""The prediction of frozen teachers at a noised clip."""

from __future__ import annotations

import torch
from distill_protocols import CleanPast, Condition, ContractError, LatentsT, PredType, map_latents
from torch import Tensor

from distill_methods.context import MethodContext
from distill_methods.contracts import expert_ranges_of
from distill_methods.teachers.config import ExpertGuidance, TeachersConfig
from distill_methods.time_sampling import MAX_T


class Teachers:
    """The weighted sum of the teachers' guided predictions, ``sum_i a_i (u + w_i (c - u))``.

    As the weights a_i add up to 1, the sum in v and the sum in x0 are the same prediction.

    Raises:
        ContractError: a guidance is of a second expert that no teacher has.
    """

    def __init__(self, context: MethodContext, config: TeachersConfig) -> None:
        self._context = context
        self._teachers = config.weighted_teachers
        self.names = tuple(self._teachers)
        ranges = {name: expert_ranges_of(context.adapter, name) for name in self.names}
        single = [n for n, own in ranges.items() if len(own) == 1 and own[0][1] == MAX_T]
        for problem in config.teacher_problems(single):
            raise ContractError(f"{'.'.join(problem.path)}: {problem.message}")

    @torch.no_grad()
    def predict(
        self,
        x_t: LatentsT,
        t: Tensor,
        cond: Condition,
        *,
        pred_type: PredType = "v",
        past: CleanPast | None = None,
    ) -> LatentsT:
        """Return the weighted prediction, like ``x_t``, without gradient.

        Args:
            t: [B], all of it in one expert's range of each teacher.
            past: what the chunks of causal teachers see before them; None: those of ``x_t``.
        """
        negative = self._context.draw_negative(len(x_t))
        total: LatentsT | None = None
        for name, (weight, guidance) in self._teachers.items():
            prediction = self._context.adapter.forward(
                name,
                x_t,
                t,
                cond,
                fwd_pred_type=pred_type,
                neg_cond=negative,
                cfg=self._guidance_at(name, t, guidance),
                caches=past,
            )
            term = (
                prediction
                if weight == 1
                else map_latents(lambda tensor, factor=weight: factor * tensor, prediction)
            )
            total = term if total is None else map_latents(torch.add, total, term)
        assert total is not None  # A config has at least one teacher.
        return total

    def _guidance_at(self, name: str, t: Tensor, guidance: ExpertGuidance) -> float:
        """Return w of the expert that ``t`` goes to."""
        ranges = expert_ranges_of(self._context.adapter, name)
        # Reading a value of t makes the host wait for the device: only where it decides something.
        if guidance.high_noise == guidance.low_noise:
            return guidance.high_noise
        if len(ranges) == 1:  # one transformer, or one expert of several
            return guidance.high_noise if ranges[0][1] == MAX_T else guidance.low_noise
        boundary = ranges[-1][0]
        is_high_noise = float(t.flatten()[0]) >= boundary
        return guidance.high_noise if is_high_noise else guidance.low_noise
