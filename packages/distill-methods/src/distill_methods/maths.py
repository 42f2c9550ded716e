"""The maths of the methods: pure functions, each written once, with paper and equation.

Letters: B batch, C channels, T latent frames, H and W latent height and width. Latents are
[B, C, T, H, W], t in [0, 1000] is [B] or, one a frame, [B, T], ``x_t = (1 - s) x0 + s eps`` with
``s = t / 1000`` and ``v = eps - x0``. Guidance and the conversions between v, x0 and eps belong to
the adapter.

Everything is computed in fp32 or wider: the losses are differences of predictions that are nearly
equal, and of two bf16 numbers that agree in most of their 8 bits little would be left.

``loss_mask`` is, everywhere, 1 on frames that the model predicts and 0 on frames that the condition
gives (``contracts.loss_mask_of``), [1, 1, T, 1, 1]; None means 1. Means are over the former.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from distill_protocols import RowGenerators, shift_sigma
from torch import Tensor

from distill_methods.time_sampling import (
    MAX_T,
    TimeRange,
    TimeSampling,
    probability_below,
    probability_within,
    unlimited_range,
)

# Minimum over [0, 1000] of the bell of ``bsmntw_weight``, at both ends, and its mean above that.
_BSMNTW_MIN = math.exp(-0.5)
_BSMNTW_MEAN = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - _BSMNTW_MIN

# -- distribution matching --------------------------------------------------------------------


def dmd_normaliser(x: Tensor, real_x0: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Return ``mean |x - r|`` of each sample, [B, 1, 1, 1, 1] (DMD, Yin et al. 2024, eq. 8)."""
    x, real_x0 = _widen(x), _widen(real_x0)
    # Per sample and not over the batch: how much a sample counts must not depend on which other
    # samples it is trained with.
    means = _mean_per_sample((x - real_x0).abs(), loss_mask)
    return means.view(-1, *[1] * (x.ndim - 1))


def dmd_gradient(
    x: Tensor, fake_x0: Tensor, real_x0: Tensor, loss_mask: Tensor | None = None
) -> Tensor:
    """Return ``g = nan_to_num((f - r) / mean |x - r|)``: the direction from the data to the
    student's clips (DMD, Yin et al. 2024, eq. 7 and 8; tianweiy/DMD2 ``sd_guidance.py``).

    With scores (alpha x0 - x_t) / sigma^2 the difference of two scores is alpha / sigma^2 times
    that of two x0. The weight of eq. 8 cancels that factor but for one alpha, which DMD2's code
    leaves out.

    Args:
        x: the student's clean latents.
        fake_x0: f, the critic's prediction at the noised x.
        real_x0: r, the (guided) teacher's prediction at the same noised x.

    Returns:
        g like x, without history.
    """
    # No gradient: eq. 7 is the gradient of the KL already. Differentiating f or r by x would add
    # the Jacobians of the two score models, which are no part of it.
    with torch.no_grad():
        difference = _widen(fake_x0) - _widen(real_x0)
        # 0 / 0 is a sample on which all three agree: nothing to learn there, so 0. A prediction
        # that is not finite leaves its sample out in the same way.
        gradient = torch.nan_to_num(difference / dmd_normaliser(x, real_x0, loss_mask))
        return gradient if loss_mask is None else gradient * loss_mask


def dmd_loss(x: Tensor, gradient: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Return ``0.5 mean((x - stop(x - g))^2)``, a scalar with ``dL/dx = g / numel``
    (tianweiy/DMD2).

    Its value is ``mean g^2 / 2`` and does not measure quality.
    """
    x = _widen(x)
    # The stop-gradient makes x - g a constant target, so that the derivative of the square is
    # just g: the chain rule then takes g through the student.
    error = (x - (x - gradient).detach()).square()
    return 0.5 * (error.mean() if loss_mask is None else _mean_per_sample(error, loss_mask).mean())


def add_phase_noise(x_start: Tensor, noise: Tensor, t: Tensor, t_start: float) -> Tensor:
    """Return ``x_t = a x_b + beta eps`` of clips that have the noise of ``t_start`` already, like
    them (Phased DMD, arXiv:2510.27684; ModelTC/LightX2V@f8aee98b
    ``lightx2v_train/trainers/phased_dmd/math.py``).

    ``a = (1 - s) / (1 - s_b)`` and ``beta^2 = s^2 - a^2 s_b^2``: where x_b is ``(1 - s_b) x0 +
    s_b eps'``, x_t is ``(1 - s) x0 + s eps''``. With t_start = 0 it is ``add_noise``.

    Args:
        x_start: x_b, clips at t_start [B, C, T, H, W].
        t: [B], above ``t_start``.
    """
    a, beta = _phase_kernel(t, t_start)
    return a * _widen(x_start) + beta * _widen(noise)


def phase_velocity(x_start: Tensor, noise: Tensor, t: Tensor, t_start: float) -> Tensor:
    """Return ``(s + (1 - s) s_b^2 / (1 - s_b)^2) / beta eps - x_b / (1 - s_b)``, whose mean given
    x_t of ``add_phase_noise`` is the velocity of the clips' distribution at t.

    Derivation: the kernel's score is ``-eps / beta``, and its mean given x_t is the score of x_t.
    As ``score = -eps_hat / s`` and ``x_t = (1 - s) x0_hat + s eps_hat``, the velocity
    ``eps_hat - x0_hat`` is ``-x_t / (1 - s) - s / (1 - s) score``. Put in, and x_t with it. With
    t_start = 0 it is ``eps - x0``.

    Its variance is that of 1 / (1 - s_b) clips and grows without bound as t nears ``t_start``.
    """
    s, s_b = _expand_sigma(t), t_start / 1000
    _, beta = _phase_kernel(t, t_start)
    of_noise = (s + (1 - s) * (s_b / (1 - s_b)) ** 2) / beta
    return of_noise * _widen(noise) - _widen(x_start) / (1 - s_b)


def _phase_kernel(t: Tensor, t_start: float) -> tuple[Tensor, Tensor]:
    """Return a and beta, [B, 1, 1, 1, 1]."""
    s, s_b = _expand_sigma(t), t_start / 1000
    a = (1 - s) / (1 - s_b)
    # As a product: s^2 and a^2 s_b^2 are nearly equal where t is near t_start.
    return a, ((s - a * s_b) * (s + a * s_b)).sqrt()


# -- regression -------------------------------------------------------------------------------


def velocity_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """Return ``mean w |v - v_target|^2`` (flow matching, Lipman et al. 2023, eq. 14).

    It is taken on v itself: going v -> x0 in bf16 and back adds an RMS error of 0.084 at sigma
    0.02, because the conversion back divides by sigma.

    Args:
        weight: one factor a sample, [B], or a frame, [B, T]; None means 1.
    """
    error = (_widen(pred) - _widen(target)).square()
    if weight is not None and weight.dim() == 2:
        error, weight = error * weight[:, None, :, None, None], None
    if weight is None and loss_mask is None:
        return error.mean()
    means = _mean_per_sample(error, loss_mask)
    return (means if weight is None else means * weight).mean()


def x0_regression_loss(
    pred: Tensor, target: Tensor, weight: Tensor, loss_mask: Tensor | None = None
) -> Tensor:
    """Return ``mean w |x - x_target|^2`` on clean latents (CausVid, Yin et al. 2025, section 4.3).

    Args:
        weight: what each frame of each sample counts, [B, 1, T, 1, 1].
    """
    error = (_widen(pred) - _widen(target)).square() * weight
    return _mean_per_sample(error, loss_mask).mean()


def velocity_weight(t: Tensor, error_of: Literal["v", "x0", "eps"]) -> Tensor | None:
    """Return the weight, like ``t``, with which ``velocity_loss`` is the squared error of another
    prediction: s^2 of ``x0 = x_t - s v``, (1 - s)^2 of ``eps = x_t + (1 - s) v``; None of v."""
    if error_of == "v":
        return None
    s = _widen(t) / 1000
    return (s if error_of == "x0" else 1 - s).square()


def bsmntw_weight(t: Tensor) -> Tensor:
    """Return the bell-shaped timestep weight of mean 1, like ``t`` (DiffSynth-Studio
    ``flow_match.py``).

    ``w = (exp(-2 ((t - 500) / 1000)^2) - exp(-1/2)) / c``, with c such that the mean over t in
    [0, 1000] is 1. It is 0 at t = 0 and at t = 1000. DiffSynth normalises over its (shifted)
    table of timesteps instead, which differs by one constant factor.
    """
    bell = torch.exp(-2 * ((_widen(t) - 500) / 1000).square())
    return ((bell - _BSMNTW_MIN) / _BSMNTW_MEAN).clamp(min=0)


# -- consistency ------------------------------------------------------------------------------


def x0_distance(
    pred: Tensor, target: Tensor, huber_c: float | None = None, loss_mask: Tensor | None = None
) -> Tensor:
    """Return ``mean d^2`` of d = pred - target, or the pseudo-Huber metric
    ``mean (sqrt(d^2 + c^2) - c)`` (Song & Dhariwal 2023, section 3.3; LCM, Luo et al. 2023)."""
    square = (_widen(pred) - _widen(target)).square()
    if huber_c is not None:
        # The same as sqrt(d^2 + c^2) - c. That form subtracts two nearly equal numbers where d is
        # small beside c, and loses all digits of d.
        square = square / ((square + huber_c**2).sqrt() + huber_c)
    return square.mean() if loss_mask is None else _mean_per_sample(square, loss_mask).mean()


def consistency_tangent(
    velocity: Tensor,
    teacher_velocity: Tensor,
    scaled_derivative: Tensor,
    t: Tensor,
    warmup: float = 1.0,
) -> Tensor:
    """Return g: sCM's tangent ``cos(t) df/dt`` in the variables of flow matching, like
    ``velocity``.

    ``(1 - s) r ((v_T - v) - warmup s dv/ds)`` with ``r = sqrt((1 - s)^2 + s^2)``: TrigFlow's time
    has ``cos = (1 - s) / r`` and ``ds/dt = r^2``, and x0 = f is the same in both (Lu & Song 2024,
    eq. 6 and section 4.1).

    Args:
        velocity: v, the student's.
        teacher_velocity: v_T, guided.
        scaled_derivative: ``s dv/ds`` of the student along the teacher's trajectory.
        warmup: how much of the derivative counts, 0 to 1 (sCM, section 4.2, tangent warmup); at 0
            the student only learns v_T, which is safe before v is smooth in t.
    """
    # No gradient: sCM's loss follows g as it is. Differentiating it would need the second
    # derivative of the student.
    with torch.no_grad():
        s, r = _noise_level_and_radius(t)
        difference = _widen(teacher_velocity) - _widen(velocity)
        return (1 - s) * r * (difference - warmup * _widen(scaled_derivative))


def normalised_tangent(tangent: Tensor, c: float, loss_mask: Tensor | None = None) -> Tensor:
    """Return ``sqrt(D) g / (|g| + c)``, |g| over the D numbers of a sample (sCM, section 4.2; as
    in NVlabs/rcm).

    Its root mean square is 1, whatever D. Frames that ``loss_mask`` leaves out count neither in
    |g| nor in D.
    """
    mean_square = _mean_per_sample(tangent.square(), loss_mask)
    if loss_mask is None:
        count: int | Tensor = tangent[0].numel()
    else:
        count = loss_mask.expand(1, *tangent.shape[1:]).sum()
    rms = mean_square.sqrt().view(-1, *[1] * (tangent.ndim - 1))
    # Per sample, so that one steep sample does not make the others' steps small. A sample whose
    # derivative is not finite gets 0: it is left out instead of ending the run.
    direction = torch.nan_to_num(tangent / (rms + c / count**0.5), posinf=0.0, neginf=0.0)
    return direction if loss_mask is None else direction * loss_mask


def consistency_prior_weight(t: Tensor) -> Tensor:
    """Return ``(1 - s) / s`` of t >= 1, like ``t``: ``1 / tan(t)`` in TrigFlow's time (sCM, Lu &
    Song 2024, section 4.2, adaptive weighting; NVlabs/FastGen ``sCM.py``,
    ``prior_weighting_enabled``)."""
    s = (_widen(t) / 1000).clamp(min=1e-3)
    return (1 - s) / s


def tangent_loss(
    velocity: Tensor,
    direction: Tensor,
    t: Tensor,
    loss_mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Return ``0.5 mean w (r v - stop(r v + direction))^2``, a scalar with
    ``dL/dv = -w r direction / numel`` (sCM, Lu & Song 2024, section 4.2).

    Without w its value is ``mean direction^2 / 2``, which is near 0.5 as long as there is an error:
    it does not fall.

    Args:
        weight: one factor a sample, [B]; None means 1.
    """
    # r v is TrigFlow's network output F. As in ``dmd_loss``, the stop-gradient makes the
    # derivative by it the given direction, of opposite sign.
    scaled = _noise_level_and_radius(t)[1] * _widen(velocity)
    error = (scaled - (scaled + direction).detach()).square()
    if weight is None and loss_mask is None:
        return 0.5 * error.mean()
    means = _mean_per_sample(error, loss_mask)
    return 0.5 * (means if weight is None else weight * means).mean()


# -- flow maps --------------------------------------------------------------------------------


def flow_map_target(velocity: Tensor, derivative: Tensor, t: Tensor, target_t: Tensor) -> Tensor:
    """Return ``v - (s - s_r) du/ds``: the average velocity from t to r, like ``velocity``, if u is
    (MeanFlow, Geng et al. 2025, eq. 6).

    Args:
        derivative: du/ds of the average along the trajectory.
        target_t: r, [B].
    """
    length = (_widen(t) - _widen(target_t)).view(-1, 1, 1, 1, 1) / 1000
    return _widen(velocity) - length * _widen(derivative)


def flow_map_weight(t: Tensor) -> Tensor:
    """Return ``15/4 s sqrt(1 - s)``, like ``t``: its mean over uniform s is 1 (AnyFlow,
    arXiv:2605.13724; NVlabs/AnyFlow ``scheduling_flowmap_euler_discrete.py``, "beta08", which
    normalises over its shifted table instead: one constant factor)."""
    s = _widen(t) / 1000
    return 15 / 4 * s * (1 - s).sqrt()


def flow_map_loss(
    pred: Tensor,
    target: Tensor,
    t: Tensor,
    power: float,
    c: float,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """Return ``mean w(t) d / stop(d + c)^p``, d a sample's mean square error (MeanFlow, Geng et al.
    2025, eq. 22, with AnyFlow's weight of t)."""
    error = _mean_per_sample((_widen(pred) - _widen(target)).square(), loss_mask)
    # The weight is a constant: with p = 1 a loss of d / (d + c) would stop to learn where d >> c.
    adaptive = (error.detach() + c).pow(-power)
    return (flow_map_weight(t) * adaptive * error).mean()


# -- noise levels and noise -------------------------------------------------------------------


def sample_timesteps(time: TimeSampling, rows: RowGenerators, shape: Sequence[int] = ()) -> Tensor:
    """Draw ``t = clamp(1000 S_k(u), t_min, t_max)`` for each row, or t within these limits
    (``TimeSampling.limits``): fp32 [B, *shape] on the generators' device.

    u is uniform, or ``sigmoid(N(mean, std))`` (SD3, Esser et al. 2024, eq. 19 and 23).
    """
    if time.limits == "truncate":
        return sample_timesteps_within(rows.uniform(shape), time, (time.t_min, time.t_max))
    if time.distribution == "uniform":
        u = rows.uniform(shape)
    else:
        u = torch.sigmoid(time.mean + time.std * rows.normal(shape))
    return (1000 * shift_sigma(u, time.shift)).clamp(time.t_min, time.t_max)


def sample_timesteps_within(quantiles: Tensor, time: TimeSampling, time_range: TimeRange) -> Tensor:
    """Draw t of ``sample_timesteps``' distribution, given that it lies in ``time_range``: fp32,
    of the shape of ``quantiles``.

    Args:
        quantiles: uniform in [0, 1); t rises with them.
        time_range: one of a probability above 0.
    """
    low, high = time_range
    # The inverse distribution function at quantiles of the range alone. In fp64, as ndtri is
    # steep near 0 and 1.
    q = probability_below(time, low) + quantiles.double() * probability_within(time, low, high)
    first, last = unlimited_range(time)
    q = first + q * (last - first)
    if time.distribution == "uniform":
        u = q
    else:
        u = torch.sigmoid(time.mean + time.std * torch.special.ndtri(q))
    t = (MAX_T * shift_sigma(u, time.shift)).clamp(time.t_min, time.t_max).float()
    top = torch.tensor(high, dtype=torch.float32)
    if high < MAX_T:
        # Rounded to fp32, t may have reached the next range, and with it another expert.
        top = torch.nextafter(top, torch.zeros(()))
    return t.clamp(low, float(top))


def standard_noise(shape: Sequence[int], rows: RowGenerators, device: torch.device) -> Tensor:
    """Draw standard normal noise [B, *shape], fp32, each sample's from its own row."""
    return rows.normal(shape).to(device)


def repeat_per_frame(values: Tensor, frames: Sequence[int]) -> Tensor:
    """Repeat what each chunk has, [B, chunks], for each of its frames, [B, T].

    Args:
        frames: of each chunk; T is their sum.
    """
    assert values.shape[1] == len(frames)
    return torch.cat([values[:, i : i + 1].expand(-1, n) for i, n in enumerate(frames)], dim=1)


def _noise_level_and_radius(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return s and r = sqrt((1 - s)^2 + s^2), the length of (signal, noise), [B, 1, 1, 1, 1]."""
    s = _expand_sigma(t)
    return s, ((1 - s).square() + s.square()).sqrt()


def _expand_sigma(t: Tensor) -> Tensor:
    """Return s of t [B], as [B, 1, 1, 1, 1]."""
    return (_widen(t) / 1000).view(-1, 1, 1, 1, 1)


def _mean_per_sample(value: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Return the mean of each sample, [B], over what ``loss_mask`` leaves."""
    if loss_mask is None:
        return value.flatten(1).mean(dim=1)
    count = loss_mask.expand(1, *value.shape[1:]).sum()
    return (value * loss_mask).flatten(1).sum(dim=1) / count


def _widen(value: Tensor) -> Tensor:
    """Convert to fp32, unless ``value`` is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
