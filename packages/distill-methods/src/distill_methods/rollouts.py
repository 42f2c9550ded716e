"""Clips of a student that is called once with gradient, at one of its sampler's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from distill_protocols import Batch
from torch import Tensor

from distill_methods.contracts import LatentDiffusion, chunks_of
from distill_methods.distribution_matching.matching import Rollout, exit_levels
from distill_methods.draws import Draws
from distill_methods.latent_config import LatentMethodConfig

Source = Literal["simulate", "data"]
"""Where the student's input comes from: its own sampling from noise (DMD2, section 4.5, backward
simulation), or a noised clip of the data (FastGen, CausVid)."""


class StudentRollouts:
    """``x = G(x_in, t_k)`` at a step k of ``config.student_sampler``.

    Every draw of a sample has rows of its own, so that micro batches and ranks see the numbers
    that one large batch would.

    Args:
        name: of the method; draws are named after it.
        device: where the student is called.
        poll: called before each model call.
    """

    def __init__(
        self,
        name: str,
        adapter: LatentDiffusion,
        config: LatentMethodConfig,
        source: Source,
        *,
        draws: Draws,
        device: torch.device,
        poll: Callable[[], None],
    ) -> None:
        self._name = name
        self._adapter = adapter
        self._config = config
        self._source = source
        self._draws = draws
        self._poll = poll
        # Here once, as copying them in each step would make the host wait for the device.
        levels = [1000 * sigma for sigma in config.student_sampler.sigmas()]
        self._levels = torch.tensor(levels).to(device)

    def __call__(self, batch: Batch, turn: str, iteration: int) -> Rollout:
        """With gradient where the caller allows it.

        Args:
            turn: whose; each has draws of its own.
        """
        purpose, size = f"{self._name}.{turn}", len(batch)
        among = exit_levels(self._draws, self._config, purpose, iteration)
        if self._source == "data":
            return self._from_data(batch, purpose, among)
        # Shared, or the ranks of a sharded student would wait for each other for ever.
        k = among[self._draws.shared_integer(f"{purpose}.exit_step", len(among))]
        x0 = self._adapter.rollout(
            "student",
            self._config.student_sampler,
            self._draws.noise_like(batch.latents, f"{purpose}.rollout"),
            batch.cond,
            exit_steps=(k,) * len(chunks_of(self._adapter, "student")),
            generators=self._draws.streams.rows(f"{purpose}.rollout.fresh", size),
            poll=self._poll,
        )
        return Rollout(x0, torch.full((size,), k, device=x0.device))

    def _from_data(self, batch: Batch, purpose: str, among: tuple[int, ...]) -> Rollout:
        drawn = self._draws.streams.rows(f"{purpose}.data_step", len(batch)).integers(len(among))
        steps = torch.tensor(among, device=drawn.device)[drawn].to(batch.latents.device)
        noise = self._draws.noise_like(batch.latents, f"{purpose}.data_noise")
        latents = self._adapter.normalize_latents(batch.latents)
        x_t = self._adapter.add_noise(latents, noise, self._levels[steps])
        x0: Tensor = self._adapter.forward(
            "student", x_t, self._levels[steps], batch.cond, fwd_pred_type="x0"
        )
        return Rollout(x0, steps)
