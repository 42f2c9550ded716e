"""What frozen teachers say of a noised clip."""

from __future__ import annotations

import torch
from distill_protocols import Condition, ContractError, PredType
from torch import Tensor

from distill_methods.contracts import LatentDiffusion
from distill_methods.draws import Draws
from distill_methods.teachers import TeachersConfig


class Teachers:
    """The weighted sum of the teachers' guided predictions, ``sum_i a_i (u + w_i (c - u))``.

    As the weights a_i add up to 1, it is the same sum in v as in x0.

    Args:
        negative: one row, where a teacher is guided.

    Raises:
        ContractError: a guidance is of a second expert that no teacher has.
    """

    def __init__(
        self,
        adapter: LatentDiffusion,
        config: TeachersConfig,
        *,
        draws: Draws,
        negative: Condition | None,
    ) -> None:
        self._adapter = adapter
        self._draws = draws
        self._negative = negative
        self._terms = config.terms
        self.names = tuple(config.terms)
        single = [name for name in self.names if len(draws.expert_ranges(name)) == 1]
        for problem in config.teacher_problems(single):
            raise ContractError(f"{'.'.join(problem.path)}: {problem.message}")

    @torch.no_grad()
    def predict(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, pred_type: PredType = "v"
    ) -> Tensor:
        """Of all teachers, like ``x_t``, without gradient; ``t`` [B] within one range of each."""
        total: Tensor | None = None
        for name, (weight, guidances) in self._terms.items():
            found = self._adapter.forward(
                name,
                x_t,
                t,
                cond,
                fwd_pred_type=pred_type,
                neg_cond=self._negative,
                cfg=self._draws.guidance(name, t, guidances),
            )
            part = found if weight == 1 else weight * found
            total = part if total is None else total + part
        assert total is not None  # a config has a teacher
        return total
