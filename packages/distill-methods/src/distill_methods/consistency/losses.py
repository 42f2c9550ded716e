"""The two consistency losses, each of one micro batch: parts that methods put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from distill_protocols import (
    Batch,
    CleanPast,
    Condition,
    ContractError,
    Latents,
    map_latents,
    one_tensor,
)
from torch import Tensor

from distill_methods.consistency.config import (
    CONTINUOUS_WITH_EXPERTS,
    WITHOUT_LOW_NOISE,
    Continuous,
    Discrete,
)
from distill_methods.context import MethodContext
from distill_methods.contracts import expert_ranges_of, loss_mask_of, require_contract
from distill_methods.derivatives import finite_difference
from distill_methods.maths import (
    consistency_prior_weight,
    consistency_tangent,
    normalised_tangent,
    tangent_loss,
    x0_distance,
)
from distill_methods.parts import measure_parts, name_parts, sum_part_losses
from distill_methods.teachers.ensemble import Teachers
from distill_methods.time_sampling import TimeRange, fraction_within


class ConsistencyResult(NamedTuple):
    """A loss, and detached clips and metrics for logs."""

    loss: Tensor
    outputs: dict[str, Tensor]


ConsistencyLoss = Callable[[Batch, int], ConsistencyResult]
"""The loss of a micro batch in an iteration."""


def build_consistency_loss(
    context: MethodContext,
    form: Discrete | Continuous,
    *,
    teachers: Teachers,
    update_of: Callable[[int], int],
) -> ConsistencyLoss:
    """Build the loss of ``form``; see the two classes for the arguments."""
    if isinstance(form, Continuous):
        return ContinuousConsistency(context, form, teachers=teachers, update_of=update_of)
    return DiscreteConsistency(context, form, teachers=teachers)


class DiscreteConsistency:
    """The student's clean clip at t is the one that it gives one step further on the teacher's
    trajectory (Song et al. 2023, algorithm 2; LCM, Luo et al. 2023)::

        t = t_n of the grid, t' = t_{n+k} (0 beyond its end), x_t = (1 - s) x0 + s eps
        x_t' = x_t + (s' - s) v_teacher(x_t, t)         one Euler step of the guided teacher
        L    = mean d(x0_student(x_t, t), stop(x0_student(x_t', t')))

    At t' = 0 the target is x_t' itself, as x0 = x - s v: the boundary condition holds by itself.

    If the student has two experts, the target is that of the one for t': an iteration's pairs have
    all their t in one expert's range and all their t' in one, drawn with their share of the grid
    as probability.

    Args:
        past_of: gives what the chunks of causal models see before them, of normalised clips; None:
            the noised chunks of the same call.
        averaged_target: the target comes from the average of the student's weights that the run
            keeps (``RoleHandle.ema``), and not from the student as it is.
    """

    def __init__(
        self,
        context: MethodContext,
        config: Discrete,
        *,
        teachers: Teachers,
        past_of: Callable[[Latents], CleanPast] | None = None,
        averaged_target: bool = False,
    ) -> None:
        self._context = context
        self._config = config
        self._teachers = teachers
        self._past_of = past_of
        self._averaged_target = averaged_target
        ranges = expert_ranges_of(context.adapter, "student", *teachers.names)
        student = expert_ranges_of(context.adapter, "student")
        if not student or student[0][0] > 0:
            raise ContractError(WITHOUT_LOW_NOISE)
        self._pair_groups = _group_pairs(config, ranges)
        if not self._pair_groups:
            raise ContractError(
                f"student and teachers can be called at t in {list(ranges)}, and no point of the "
                "grid is there. Give them the same experts, or a finer grid"
            )
        # On the device once: copying them in each step would make the host wait for it.
        self._pairs = torch.tensor(config.pairs).to(context.device)

    def __call__(self, batch: Batch, iteration: int) -> ConsistencyResult:
        """``outputs``: ``student_x0`` at t and its target ``target_x0``."""
        adapter = self._context.adapter
        x0 = adapter.normalize_latents(batch.clean_latents)
        t, t_next = self._sample_pairs(len(batch), iteration)
        noise = self._context.noise.noise_like(x0, f"{self._context.name}.noise")
        x_t = adapter.add_noise(x0, noise, t)
        past = None if self._past_of is None else self._past_of(x0)
        # The target is a constant (theta^- of algorithm 2): it is nearer to the data, where the
        # boundary condition holds. With gradient through both calls, the loss would also pull the
        # target towards the prediction, so that errors spread to where there are none.
        with torch.no_grad():
            velocity = self._teachers.predict(x_t, t, batch.cond, past=past)
            step = ((t_next - t) / 1000).view(-1, 1, 1, 1, 1)
            x_next = map_latents(lambda x, v: x + step * v, x_t, velocity)
            # Before the call with gradient, whose graph must not see weights that are exchanged.
            with self._context.bundle["student"].averaged(ema=self._averaged_target):
                target = adapter.forward(
                    "student", x_next, t_next, batch.cond, fwd_pred_type="x0", caches=past
                )
        student = adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="x0", caches=past)
        huber_c = self._config.huber_c if self._config.loss == "huber" else None
        loss, part_losses = sum_part_losses(
            adapter,
            "consistency_loss",
            lambda x, x_target, mask: x0_distance(x, x_target, huber_c, mask),
            student,
            target,
            loss_mask=loss_mask_of(adapter, batch),
        )
        outputs = {
            **measure_parts("student_x0", Tensor.detach, student),
            **name_parts("target_x0", target),
            **part_losses,
        }
        return ConsistencyResult(loss, outputs)

    def _sample_pairs(self, count: int, iteration: int) -> tuple[Tensor, Tensor]:
        """Draw (t, t') of each sample, each [B]."""
        name, noise = self._context.name, self._context.noise
        total = sum(map(len, self._pair_groups))
        probabilities = [len(group) / total for group in self._pair_groups]
        group = self._pair_groups[
            noise.sample_index(f"{name}.pair.range", iteration, probabilities)
        ]
        indices = noise.streams.rows(f"{name}.pair", count).integers(len(group))
        grid_points = torch.tensor(group, device=indices.device)[indices]
        t, t_next = self._pairs[grid_points.to(self._pairs.device)].unbind(dim=1)
        return t, t_next


class ContinuousConsistency:
    """The student's clean clip does not change along the teacher's trajectory (sCM, Lu & Song
    2024).

    With f = x_t - s v and the trajectory's ``dx_t / ds = v_T``::

        df/ds = (v_T - v) - s dv/ds,   dv/ds = (d_x v) v_T + d_s v      a Jacobian-vector product
        g = (1 - s) r ((v_T - v) - a s dv/ds),   r = sqrt((1 - s)^2 + s^2),   a = min(1, n / warmup)
        L = 0.5 mean (r v - stop(r v + sqrt(D) g / (|g| + c)))^2         |g| over a sample's D

    The factors r and 1 - s make it sCM's loss in TrigFlow's variables: there the network output F
    is r v plus a term without weights, and the tangent cos(t) df/dt is g.

    Args:
        update_of: gives the number of the student's update that an iteration is, from 1; the
            tangent warmup counts them.

    Raises:
        ContractError: the student has two experts, or the one for high noise levels alone.
        CapabilityError: ``derivative: jvp``, and the adapter has no forward-mode derivatives.
    """

    def __init__(
        self,
        context: MethodContext,
        config: Continuous,
        *,
        teachers: Teachers,
        update_of: Callable[[int], int],
    ) -> None:
        ranges = expert_ranges_of(context.adapter, "student")
        if len(ranges) > 1 or not ranges or ranges[0][0] > 0:
            raise ContractError(CONTINUOUS_WITH_EXPERTS if len(ranges) > 1 else WITHOUT_LOW_NOISE)
        self._context = context
        self._config = config
        self._tangents = (
            require_contract(context.adapter.tangents, "supports_jvp", by=context.name)
            if config.derivative == "jvp"
            else None
        )
        self._teachers = teachers
        self._update_of = update_of

    def __call__(self, batch: Batch, iteration: int) -> ConsistencyResult:
        """``outputs``: ``student_x0`` and ``teacher_x0`` at t; ``tangent_rms``, the root mean
        square of g (nan: a derivative was not finite, and its samples were left out)."""
        adapter = self._context.adapter
        x0 = adapter.normalize_latents(one_tensor(batch.clean_latents))
        noised = self._context.noise.add_noise_at_random_time(
            x0, self._context.name, iteration, self._config.time, "student", *self._teachers.names
        )
        x_t, t = one_tensor(noised.x_t), noised.t
        velocity = adapter.forward("student", x_t, t, batch.cond, fwd_pred_type="v")
        loss_mask = loss_mask_of(adapter, batch)
        with torch.no_grad():
            teacher_velocity = self._teachers.predict(x_t, t, batch.cond)
            scaled_derivative = self._scaled_derivative(x_t, t, batch.cond, teacher_velocity)
            warmup = self._config.warmup_at(self._update_of(iteration))
            tangent = consistency_tangent(velocity, teacher_velocity, scaled_derivative, t, warmup)
            outputs = {
                "student_x0": adapter.pred_to_x0(velocity, x_t, t),
                "teacher_x0": adapter.pred_to_x0(teacher_velocity, x_t, t),
                "tangent_rms": tangent.square().mean().sqrt(),
            }
            direction = normalised_tangent(tangent, self._config.tangent_c, loss_mask)
        is_weighted = self._config.prior_weight == "inverse_noise"
        weight = consistency_prior_weight(t) if is_weighted else None
        return ConsistencyResult(tangent_loss(velocity, direction, t, loss_mask, weight), outputs)

    def _scaled_derivative(
        self, x_t: Tensor, t: Tensor, cond: Condition, teacher_velocity: Tensor
    ) -> Tensor:
        """Return ``s dv/ds`` of the student along the teacher's trajectory, like ``x_t``."""
        sigma = (t / 1000).view(-1, 1, 1, 1, 1)
        if self._tangents is None:
            adapter = self._context.adapter
            return sigma * finite_difference(
                lambda x, time: adapter.forward("student", x, time, cond, fwd_pred_type="v"),
                x_t,
                t,
                teacher_velocity,
                self._config.difference,
            )
        # Multiplied by s before the call and not after it: the directions 1000 s and s v_T stay
        # small where 16 bits would not hold 1000 times a derivative (sCM, section 5.1).
        _, derivative = self._tangents.forward_jvp(
            "student", x_t, t, cond, dx=sigma * teacher_velocity, dt=t
        )
        return derivative


def _group_pairs(config: Discrete, ranges: tuple[TimeRange, ...]) -> list[tuple[int, ...]]:
    """Group the grid points in ``ranges`` by the expert ranges of both times of their pairs."""
    groups: dict[tuple[int, int], list[int]] = {}
    for grid_point, pair in enumerate(config.pairs):
        # Rounded to fp32, as the adapter compares them with the boundary.
        t, t_next = torch.tensor(pair).tolist()
        if not any(fraction_within([t], *time_range) for time_range in ranges):
            continue  # an expert that is not there
        key = _range_index(t, ranges), _range_index(t_next, ranges)
        groups.setdefault(key, []).append(grid_point)
    return [tuple(grid_points) for grid_points in groups.values()]


def _range_index(t: float, ranges: tuple[TimeRange, ...]) -> int:
    """Return which range ``t`` is in: at a boundary the upper one; 1000 is in the last."""
    return max(i for i, (low, _) in enumerate(ranges) if low <= t)
