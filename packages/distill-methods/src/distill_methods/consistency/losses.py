"""The two consistency losses, each of one micro batch: no method, but what methods put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from distill_protocols import Batch, ContractError
from torch import Tensor

from distill_methods.consistency.config import Continuous, Discrete, continuous_problem
from distill_methods.contracts import LatentDiffusion, tangents_of
from distill_methods.draws import Draws
from distill_methods.maths import (
    clean_distance,
    consistency_tangent,
    normalised_tangent,
    tangent_loss,
)
from distill_methods.teaching import Teachers


class Consistency(NamedTuple):
    """A loss, and detached numbers and clips to look at."""

    loss: Tensor
    outputs: dict[str, Tensor]


def consistency_loss(
    name: str,
    adapter: LatentDiffusion,
    form: Discrete | Continuous,
    *,
    draws: Draws,
    teachers: Teachers,
    device: torch.device,
    update_of: Callable[[int], int],
) -> Callable[[Batch, int], Consistency]:
    """The loss of ``form``, of a batch in an iteration; see the two classes for the rest."""
    if isinstance(form, Continuous):
        return ContinuousConsistency(
            name, adapter, form, draws=draws, teachers=teachers, update_of=update_of
        )
    return DiscreteConsistency(name, adapter, form, draws=draws, teachers=teachers, device=device)


class DiscreteConsistency:
    """The student's clean clip at t is its own one step further on the teacher's trajectory.

    ::

        t = t_n of the grid, t' = t_{n+k} (0 beyond its end), x_t = (1 - s) x0 + s eps
        x_t' = x_t + (s' - s) v_teacher(x_t, t)         one Euler step of the guided teacher
        L    = mean d(x0_student(x_t, t), stop(x0_student(x_t', t')))

    At t' = 0 the target is x_t' itself, as x0 = x - s v: the boundary holds by itself.

    Of a student of two experts, the target is that of the one for t': an iteration's pairs have
    their t in one expert's range and their t' in one, drawn with their share of the grid as chance.

    Args:
        name: of the method; its draws are named after it.
        device: where calls compute.
    """

    def __init__(
        self,
        name: str,
        adapter: LatentDiffusion,
        config: Discrete,
        *,
        draws: Draws,
        teachers: Teachers,
        device: torch.device,
    ) -> None:
        self._name = name
        self._adapter = adapter
        self._config = config
        self._draws = draws
        self._teachers = teachers
        self._classes = _classes(config, draws.expert_ranges("student", *teachers.names))
        # Here once, as copying them in each step would make the host wait for the device.
        self._pairs = torch.tensor(config.pairs).to(device)

    def __call__(self, batch: Batch, iteration: int) -> Consistency:
        """``outputs``: ``student_x0`` at t and the ``target_x0`` that it is led to."""
        x0 = self._adapter.normalize_latents(batch.latents)
        t, after = self._times(len(batch), iteration)
        noise = self._draws.noise_like(x0, f"{self._name}.noise")
        x_t = self._adapter.add_noise(x0, noise, t)
        with torch.no_grad():
            velocity = self._teachers.predict(x_t, t, batch.cond)
            x_after = x_t + ((after - t) / 1000).view(-1, 1, 1, 1, 1) * velocity
            target = self._adapter.forward(
                "student", x_after, after, batch.cond, fwd_pred_type="x0"
            )
        student = self._adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="x0")
        c = self._config.huber_c if self._config.loss == "huber" else None
        loss = clean_distance(student, target, c, self._draws.trained_frames(batch.cond))
        return Consistency(loss, {"student_x0": student.detach(), "target_x0": target})

    def _times(self, count: int, iteration: int) -> tuple[Tensor, Tensor]:
        shares = [len(places) / self._config.steps for places in self._classes]
        among = self._classes[self._draws.class_of(f"{self._name}.pair.range", iteration, shares)]
        drawn = self._draws.streams.rows(f"{self._name}.pair", count).integers(len(among))
        places = torch.tensor(among, device=drawn.device)[drawn]
        t, after = self._pairs[places.to(self._pairs.device)].unbind(dim=1)
        return t, after


class ContinuousConsistency:
    """The student's clean clip does not change along the teacher's trajectory (sCM).

    With f = x_t - s v and the trajectory's ``dx_t / ds = v_T``::

        df/ds = (v_T - v) - s dv/ds,   dv/ds = (d_x v) v_T + d_s v      a Jacobian-vector product
        g = (1 - s) r ((v_T - v) - a s dv/ds),   r = sqrt((1 - s)^2 + s^2),   a = min(1, n / warmup)
        L = 0.5 mean (r v - stop(r v + sqrt(D) g / (|g| + c)))^2         |g| over a sample's D

    r and 1 - s make it sCM's loss in TrigFlow's variables: F is r v and a term without weights, and
    g is its cos(t) df/dt.

    Args:
        name: of the method; its draws are named after it.
        update_of: which of the student's updates an iteration is, from 1; the warmup counts them.

    Raises:
        ContractError: the student has two experts.
    """

    def __init__(
        self,
        name: str,
        adapter: LatentDiffusion,
        config: Continuous,
        *,
        draws: Draws,
        teachers: Teachers,
        update_of: Callable[[int], int],
    ) -> None:
        if len(draws.expert_ranges("student")) > 1:
            raise ContractError(continuous_problem())
        self._name = name
        self._adapter = adapter
        self._tangents = tangents_of(adapter, name)
        self._config = config
        self._draws = draws
        self._teachers = teachers
        self._update_of = update_of

    def __call__(self, batch: Batch, iteration: int) -> Consistency:
        """``outputs``: ``student_x0`` and ``teacher_x0`` at t; ``tangent_rms``, the root mean
        square of g (nan: a derivative was not finite, and its samples were left out)."""
        x0 = self._adapter.normalize_latents(batch.latents)
        x_t, _, t = self._draws.noised(
            x0, self._name, iteration, self._config.time, "student", *self._teachers.names
        )
        velocity = self._adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="v")
        trained = self._draws.trained_frames(batch.cond)
        with torch.no_grad():
            teacher = self._teachers.predict(x_t, t, batch.cond)
            # Times s before the call and not after it: 1000 s and s v_T stay small where 16 bits
            # would not hold 1000 times a derivative (sCM, section 5.1).
            sigma = (t / 1000).view(-1, 1, 1, 1, 1)
            _, change = self._tangents.forward_jvp(
                "student", x_t, t, batch.cond, dx=sigma * teacher, dt=t
            )
            share = self._config.share(self._update_of(iteration))
            tangent = consistency_tangent(velocity, teacher, change, t, share)
            outputs = {
                "student_x0": self._adapter.pred_to_x0(velocity, x_t, t),
                "teacher_x0": self._adapter.pred_to_x0(teacher, x_t, t),
                "tangent_rms": tangent.square().mean().sqrt(),
            }
            direction = normalised_tangent(tangent, self._config.tangent_c, trained)
        return Consistency(tangent_loss(velocity, direction, t, trained), outputs)


def _classes(config: Discrete, ranges: tuple[tuple[float, float], ...]) -> list[tuple[int, ...]]:
    """Places in the grid, put together where both times of their pairs have the same ranges."""
    found: dict[tuple[int, int], list[int]] = {}
    for place, (t, after) in enumerate(config.pairs):
        # In fp32, as the adapter compares them.
        t, after = torch.tensor([t, after]).tolist()
        found.setdefault((_range(t, ranges), _range(after, ranges)), []).append(place)
    return [tuple(places) for places in found.values()]


def _range(t: float, ranges: tuple[tuple[float, float], ...]) -> int:
    """Equality goes high; 1000 is in the last."""
    return max(i for i, (low, _) in enumerate(ranges) if low <= t)
