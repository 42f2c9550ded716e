"""What several roles predict of the same noised clips, for people to compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from attrs import frozen
from distill_media import shrink
from distill_protocols import CapabilityError, Condition, Latents, LatentViews, RunState
from distill_runtime import RowPartition, to_uint8

from distill_trainer.config import PredictionsConfig, ViewConfig
from distill_trainer.validation.files import LONGEST_SIDE
from distill_trainer.validation.modes import eval_mode


@frozen(kw_only=True)
class Predictions:
    """Predictions of a validation.

    Attributes:
        view: whose clips are noised.
        seed: of the noise, which is one for all roles and times.
    """

    config: PredictionsConfig
    view: str
    seed: int

    @property
    def columns(self) -> tuple[str, ...]:
        """What stands beside each other in a film: the clip, and what each role makes of it."""
        return (f"{self.view}, clean", *self.config.roles)

    def make(
        self, run: RunState, latents: Latents, cond: Condition, partition: RowPartition
    ) -> dict[float, np.ndarray]:
        """Return, by t, clips of all prompts and columns [N, columns, T, H, W, 3] uint8 on rank 0;
        elsewhere nothing.

        Args:
            latents: of this rank's rows, normalised.
            cond: of the same rows.
        """
        method, rows = latent_views(run), partition.own
        made: dict[float, np.ndarray] = {}

        def show(values: Latents) -> np.ndarray | None:
            # Small before they are sent: all columns and times of all prompts come together.
            small = shrink(to_uint8(method.decode_latents(values)).numpy(), LONGEST_SIDE)
            gathered = partition.gather(torch.from_numpy(np.ascontiguousarray(small)))
            return None if gathered is None else gathered.numpy()

        with torch.no_grad(), eval_mode(run.method.model_dict.values()):
            clean = show(latents)
            for t in self.config.t:
                shown = [clean]
                for role in self.config.roles:
                    x0 = method.predict_latents(role, latents, t, cond, seed=self.seed, rows=rows)
                    shown.append(show(x0))
                columns = [clips for clips in shown if clips is not None]
                if columns:
                    made[t] = np.stack(columns, axis=1)
        return made


def latent_views(run: RunState) -> LatentViews:
    """Return the run's method, which can show predictions.

    Raises:
        CapabilityError: it cannot.
    """
    if not isinstance(run.method, LatentViews):
        raise CapabilityError(
            f"{type(run.method).__name__} does not show what roles predict. Implement "
            "sample_latents, decode_latents and predict_latents (distill_protocols.LatentViews), "
            "or leave the predictions out"
        )
    return run.method


def source_view(
    config: PredictionsConfig, views: dict[str, ViewConfig], frozen_views: Sequence[str]
) -> str:
    """Return the view whose clips are noised: the one that is named, else the first of a role
    that is not trained, else the first; of those with clips of the run's length."""
    if config.view is not None:
        return config.view
    usable = [name for name, view in views.items() if view.latent_frames is None]
    return next((name for name in usable if name in frozen_views), usable[0])
