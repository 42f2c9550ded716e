"""The noise levels of a variance-preserving model, from its scheduler's configuration. No torch.

Such a model (SDXL, Stable Diffusion 1 and 2) was trained at N discrete times n on
``x = a_n x0 + b_n eps`` with ``a^2 + b^2 = 1`` (Ho et al. 2020, DDPM, eq. 4). Divided by a + b that
is flow matching's ``x_t = (1 - s) x0 + s eps`` at ``s = b / (a + b)``: the same picture and noise,
in the same proportion b / a = s / (1 - s). A model knows the s of its N levels, and those between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Literal, cast, get_args

from attrs import field, frozen
from distill_protocols import WeightsError

from distill_diffusers.kinds import TRAIN_STEPS
from distill_diffusers.model_configs import read_integer, read_number

Prediction = Literal["epsilon", "v_prediction"]
"""What a model gives, by diffusers' names: eps, or ``a eps - b x0`` (Salimans & Ho 2022)."""


def _rises(_levels: object, _attribute: object, value: tuple[float, ...]) -> None:
    rises = all(a < b for a, b in itertools.pairwise(value))
    if len(value) < 2 or not rises or not all(map(math.isfinite, value)):
        raise WeightsError(
            f"{len(value)} noise levels of a variance-preserving model; there must be two or more, "
            "each with more noise than the one before and some of the picture left. A schedule "
            "that ends at pure noise (zero terminal SNR) is not supported"
        )


@frozen(kw_only=True)
class NoiseLevels:
    """What a model was trained at, and what it predicts.

    Attributes:
        log_ratios: log(b_n / a_n) of n = 0 .. N - 1, rising.
        prediction: see ``Prediction``.

    Raises:
        WeightsError: the levels do not rise, or the last is pure noise.
    """

    log_ratios: tuple[float, ...] = field(validator=_rises)
    prediction: Prediction = "epsilon"

    @classmethod
    def of_scheduler(cls, config: Mapping[str, object]) -> NoiseLevels:
        """Compute them from ``scheduler/scheduler_config.json``, as diffusers' DDPMScheduler does.

        Raises:
            WeightsError: an entry is missing or unknown here, or the last level is pure noise.
        """
        steps = read_integer(config, "num_train_timesteps", 1000)
        first, last = read_number(config, "beta_start", 1e-4), read_number(config, "beta_end", 0.02)
        schedule = config.get("beta_schedule", "linear")
        power = {"linear": 1.0, "scaled_linear": 0.5}.get(str(schedule))
        prediction = config.get("prediction_type", "epsilon")
        odd = [key for key in ("trained_betas", "rescale_betas_zero_snr") if config.get(key)]
        if power is None or prediction not in get_args(Prediction) or odd or steps < 2:
            raise WeightsError(
                f"a scheduler with beta_schedule {schedule!a:.40}, "
                f"prediction_type {prediction!a:.40} and {steps} levels"
                f"{''.join(f', {key}' for key in odd)}; known here are linear and scaled_linear, "
                f"{' and '.join(get_args(Prediction))}. Use a published model's scheduler"
            )
        ratios, kept = [], 1.0
        for n in range(steps):
            root = first**power + (last**power - first**power) * n / (steps - 1)
            kept *= 1 - root ** (1 / power)  # a_n^2, alpha-bar of the paper
            ratios.append(0.5 * math.log((1 - kept) / kept) if 0 < kept < 1 else math.inf)
        return cls(log_ratios=tuple(ratios), prediction=cast(Prediction, prediction))

    @property
    def time_range(self) -> tuple[float, float]:
        """t [low, high) in flow coordinates at which the model can be called.

        high is that of the last level, rounded up to a whole number so that a sampler can begin
        there: 936 for SDXL. Below the first level (t = 28 for SDXL) the model is called at n = 0.
        """
        return 0.0, float(math.ceil(self.flow_time(len(self.log_ratios) - 1)))

    def flow_time(self, n: float) -> float:
        """Return t = 1000 s of level n; between two levels log(b / a) is a straight line."""
        below = min(int(n), len(self.log_ratios) - 2)
        low, high = self.log_ratios[below : below + 2]
        return TRAIN_STEPS / (1 + math.exp(-(low + (high - low) * (n - below))))
