"""Models of another noise schedule and prediction behind the flow-matching contract.

A variance-preserving model that predicts eps, or v of Salimans & Ho (2022), is called at x_t and t
of flow matching, and gives flow matching's v. What it is called with and gives is brought over by
exact formulas (see ``noise_levels``), so that methods, samplers and guidance know nothing of it.
Euler's method in flow coordinates is DDIM (Song et al. 2021, eq. 12) in those of the model: both
take the x0 and eps that the model predicts to the next level.

Letters: B batch; s = t / 1000; a = (1 - s) / r and b = s / r with r = sqrt((1 - s)^2 + s^2).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from distill_protocols import ContractError, ExpertRouting, RoleHandle
from torch import Tensor

from distill_diffusers.calls.flow import pred_to_v, sigma_of, widen
from distill_diffusers.family_adapter import FamilyAdapter
from distill_diffusers.noise_levels import NoiseLevels, Prediction


class VariancePreservingAdapter(FamilyAdapter):
    """Base of the adapter of such models, beside that of its pictures or videos.

    The family's ``call_model`` gets ``latents`` as the model has them and n for ``t``, fp32 [B] and
    between whole numbers, and gives what the model predicts. The family states
    ``supports_expert_routing``, and ``NoiseLevels.time_range`` of its one module by
    ``expert_ranges``.
    """

    @property
    @abstractmethod
    def noise_levels(self) -> NoiseLevels:
        """Those of the run's models."""

    @property
    def experts(self) -> ExpertRouting:
        """This adapter: the models know some t alone."""
        return self

    def expert_of(self, role: str, t: Tensor) -> str:
        """Return the only module.

        Raises:
            ContractError: the model knows nothing of a t.
        """
        low, high = self.noise_levels.time_range
        if not bool(((t >= low) & (t < high)).all()):
            raise ContractError(
                f"t is {t.flatten().tolist()[:8]}, and the model of role {role!r} knows t from "
                f"{low:g} to {high:g}, where its noise levels end. Draw and sample t within"
            )
        return self._kind.modules[0]

    def expert_ranges(self, *roles: str) -> tuple[tuple[float, float], ...]:
        """Return the range that the noise levels span."""
        return (self.noise_levels.time_range,)

    def choose_module(self, role: RoleHandle, t: Tensor) -> str:
        """Return the only module, if it knows t; see ``expert_of``."""
        return self.expert_of(role.name, t)

    def start_latents(self, noise: Tensor, sigma: float) -> Tensor:
        """Begin with noise of variance 1 as the model knows it, whatever the first level is, as
        its schedulers do; in flow coordinates its deviation is r."""
        return noise * norm_of(torch.tensor(sigma, dtype=torch.float64)).to(noise)

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        """See ``FamilyAdapter.call_model``; to the model's own coordinates and back."""
        x_t, t = inputs["latents"], inputs["t"]
        own = {"latents": to_model(x_t, t), "t": level_of(t, self.noise_levels)}
        prediction = super().call_model(role, {**inputs, **own})
        return to_velocity(prediction, x_t, t, self.noise_levels.prediction)


def norm_of(sigma: Tensor) -> Tensor:
    """r = sqrt((1 - s)^2 + s^2): the deviation of x_t that the model has as 1."""
    return ((1 - sigma).square() + sigma.square()).sqrt()


def to_model(x_t: Tensor, t: Tensor) -> Tensor:
    """``x = a x0 + b eps`` from ``x_t = (1 - s) x0 + s eps``, which is r x; t is [B]."""
    x_t = widen(x_t)
    return x_t / norm_of(sigma_of(t, x_t))


def level_of(t: Tensor, levels: NoiseLevels) -> Tensor:
    """n of each t [B], fp32: log(b / a) = log(s / (1 - s)) is a straight line between two levels.

    Beyond the first and the last level it is theirs.
    """
    table = torch.tensor(levels.log_ratios, dtype=torch.float64, device=t.device)
    ratio = torch.logit(t.double() / 1000).clamp(table[0], table[-1])
    above = torch.searchsorted(table, ratio.detach()).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    return (above - 1 + (ratio - low) / (high - low)).float()


def to_velocity(prediction: Tensor, x_t: Tensor, t: Tensor, kind: Prediction) -> Tensor:
    """v = eps - x0 from what the model predicts at x_t and t [B].

    ``(eps - x_t) / (1 - s)``; or, of its own ``v' = a eps - b x0``, from which ``x0 = a x - b v'``
    and ``eps = b x + a v'`` follow: ``(b - a) x + (a + b) v'``.
    """
    if kind == "epsilon":
        return pred_to_v(prediction, x_t, t, "eps")
    prediction, x_t = widen(prediction), widen(x_t)
    sigma = sigma_of(t, x_t)
    norm = norm_of(sigma)
    return (2 * sigma - 1) / norm.square() * x_t + prediction / norm
