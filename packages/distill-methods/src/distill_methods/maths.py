"""The maths of the methods: pure functions, each written once.

Letters: B batch, C channels, T latent frames, H and W latent height and width. Latents are
[B, C, T, H, W], t in [0, 1000] is [B] or, one a frame, [B, T], ``x_t = (1 - s) x0 + s eps`` with
``s = t / 1000`` and ``v = eps - x0``. Everything is computed in fp32 or wider. Guidance and the
conversions between v, x0 and eps belong to the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from distill_protocols import RowGenerators, shift_sigma
from torch import Tensor

from distill_methods.time_ranges import TOP, Range, below, share
from distill_methods.time_sampling import TimeSampling

_BSMNTW_MIN = math.exp(-0.5)
_BSMNTW_MEAN = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - _BSMNTW_MIN


def dmd_normaliser(x: Tensor, real_x0: Tensor, trained: Tensor | None = None) -> Tensor:
    """``mean |x - r|`` of each sample, [B, 1, 1, 1, 1] (DMD, Yin et al. 2024, eq. 8).

    Over all but the batch dimension: what a sample weighs must not depend on its neighbours.
    """
    x, real_x0 = _wide(x), _wide(real_x0)
    means = _sample_means((x - real_x0).abs(), trained)
    return means.view(-1, *[1] * (x.ndim - 1))


def dmd_gradient(
    x: Tensor, fake_x0: Tensor, real_x0: Tensor, trained: Tensor | None = None
) -> Tensor:
    """``g = nan_to_num((f - r) / mean |x - r|)``: direction from the data to the student.

    DMD (Yin et al. 2024), eq. 7 and 8, as in tianweiy/DMD2 ``sd_guidance.py``.

    Args:
        x: the student's clean latents.
        fake_x0: f, the critic's prediction at the noised x.
        real_x0: r, the (guided) teacher's prediction at the same noised x.
        trained: see ``velocity_loss``.

    Returns:
        g like x, without history. 0/0, of a sample on which all three agree, is 0.
    """
    with torch.no_grad():
        difference = _wide(fake_x0) - _wide(real_x0)
        gradient = torch.nan_to_num(difference / dmd_normaliser(x, real_x0, trained))
        return gradient if trained is None else gradient * trained


def dmd_loss(x: Tensor, gradient: Tensor, trained: Tensor | None = None) -> Tensor:
    """``0.5 mean((x - stop(x - g))^2)``: a scalar with ``dL/dx = g / numel`` (tianweiy/DMD2).

    Its value is ``mean g^2 / 2`` and says little about quality. With ``trained`` (see
    ``velocity_loss``), numel counts what is 1 there.
    """
    x = _wide(x)
    error = (x - (x - gradient).detach()).square()
    return 0.5 * (error.mean() if trained is None else _sample_means(error, trained).mean())


def velocity_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    trained: Tensor | None = None,
) -> Tensor:
    """``mean w |v - v_target|^2`` (flow matching, Lipman et al. 2023, eq. 14).

    Taken on v itself: going v -> x0 in bf16 and back adds an RMS error of 0.084 at sigma 0.02.

    Args:
        weight: one factor a sample, [B], or a frame, [B, T]; None means 1.
        trained: 1 where the model predicts and 0 where the condition gave what is there
            (``ImageConditioning.trained_frames``), [1, 1, T, 1, 1]; the mean is over the former.
    """
    error = (_wide(pred) - _wide(target)).square()
    if weight is not None and weight.dim() == 2:
        error, weight = error * weight[:, None, :, None, None], None
    if weight is None and trained is None:
        return error.mean()
    means = _sample_means(error, trained)
    return (means if weight is None else means * weight).mean()


def clean_distance(
    pred: Tensor, target: Tensor, huber_c: float | None = None, trained: Tensor | None = None
) -> Tensor:
    """``mean d^2``, or ``mean (sqrt(d^2 + c^2) - c)`` (LCM, Luo et al. 2023; the pseudo-Huber
    metric), of d = pred - target. ``trained``: see ``velocity_loss``."""
    square = (_wide(pred) - _wide(target)).square()
    if huber_c is not None:
        # As it stands, it would lose all digits of a d that is small beside c.
        square = square / ((square + huber_c**2).sqrt() + huber_c)
    return square.mean() if trained is None else _sample_means(square, trained).mean()


def consistency_tangent(
    velocity: Tensor, teacher: Tensor, change: Tensor, t: Tensor, share: float = 1.0
) -> Tensor:
    """g: sCM's tangent ``cos(t) df/dt`` in the variables of flow matching, like ``velocity``.

    ``(1 - s) r ((v_T - v) - share s dv/ds)`` with ``r = sqrt((1 - s)^2 + s^2)``: TrigFlow's time
    has ``cos = (1 - s) / r`` and ``ds/dt = r^2``, and x0 = f is the same in both (Lu & Song 2024,
    eq. 6 and section 4.1).

    Args:
        velocity: the student's v.
        teacher: v_T, guided.
        change: ``s dv/ds`` along the teacher's trajectory.
        share: of the derivative, 0 to 1 (tangent warmup); at 0 g is the teacher's v alone.
    """
    with torch.no_grad():
        s, r = _levels(t)
        return (1 - s) * r * (_wide(teacher) - _wide(velocity) - share * _wide(change))


def normalised_tangent(tangent: Tensor, c: float, trained: Tensor | None = None) -> Tensor:
    """``sqrt(D) g / (|g| + c)``, |g| over the D numbers of a sample (sCM, section 4.2; as in
    NVlabs/rcm): of root mean square 1, whatever D. A sample that is not finite gets 0.

    Args:
        trained: see ``velocity_loss``; what it leaves out counts neither in |g| nor in D.
    """
    square = _sample_means(tangent.square(), trained)
    count = tangent[0].numel() if trained is None else trained.expand(1, *tangent.shape[1:]).sum()
    rms = square.sqrt().view(-1, *[1] * (tangent.ndim - 1))
    direction = torch.nan_to_num(tangent / (rms + c / count**0.5), posinf=0.0, neginf=0.0)
    return direction if trained is None else direction * trained


def tangent_loss(
    velocity: Tensor, direction: Tensor, t: Tensor, trained: Tensor | None = None
) -> Tensor:
    """``0.5 mean (r v - stop(r v + direction))^2``: a scalar with ``dL/dv = -r direction / numel``.

    Its value is ``mean direction^2 / 2``, which is near 0.5 as long as there is an error: it does
    not fall. ``trained``: see ``velocity_loss``.
    """
    scaled = _levels(t)[1] * _wide(velocity)
    error = (scaled - (scaled + direction).detach()).square()
    return 0.5 * (error.mean() if trained is None else _sample_means(error, trained).mean())


def regression_loss(
    pred: Tensor, target: Tensor, weight: Tensor, trained: Tensor | None = None
) -> Tensor:
    """``mean w |x - x_target|^2`` on clean latents (CausVid, Yin et al. 2025, section 4.3).

    Args:
        weight: what each frame of each sample counts, [B, 1, T, 1, 1].
        trained: see ``velocity_loss``.
    """
    error = (_wide(pred) - _wide(target)).square() * weight
    return _sample_means(error, trained).mean()


def timesteps_within(quantiles: Tensor, time: TimeSampling, within: Range) -> Tensor:
    """t of ``sample_timesteps``' distribution, given that it lies in ``within``: fp32, like them.

    Args:
        quantiles: uniform in [0, 1), of any shape; t rises with them.
        within: of a share above 0.
    """
    low, high = within
    q = below(time, low) + quantiles.double() * share(time, low, high)
    if time.distribution == "uniform":
        u = q
    else:
        u = torch.sigmoid(time.mean + time.std * torch.special.ndtri(q))
    t = (TOP * shift_sigma(u, time.shift)).clamp(time.t_min, time.t_max).float()
    top = torch.tensor(high, dtype=torch.float32)
    if high < TOP:  # rounded to fp32, t may have reached the next range
        top = torch.nextafter(top, torch.zeros(()))
    return t.clamp(low, float(top))


def sample_timesteps(time: TimeSampling, rows: RowGenerators, shape: Sequence[int] = ()) -> Tensor:
    """``t = clamp(1000 S_k(u), t_min, t_max)`` of each row: fp32 [B, *shape] on the generators'
    device.

    u is uniform, or ``sigmoid(N(mean, std))`` (SD3, Esser et al. 2024, eq. 19 and 23).
    """
    if time.distribution == "uniform":
        u = rows.uniform(shape)
    else:
        u = torch.sigmoid(time.mean + time.std * rows.normal(shape))
    return (1000 * shift_sigma(u, time.shift)).clamp(time.t_min, time.t_max)


def bsmntw_weight(t: Tensor) -> Tensor:
    """Bell-shaped timestep weight of mean 1, like ``t`` (DiffSynth-Studio ``flow_match.py``).

    ``w = (exp(-2 ((t - 500) / 1000)^2) - exp(-1/2)) / c``, with c such that the mean over t in
    [0, 1000] is 1. It is 0 at t = 0 and at t = 1000. DiffSynth normalises over its (shifted)
    table of timesteps instead, which differs by one constant factor.
    """
    bell = torch.exp(-2 * ((_wide(t) - 500) / 1000).square())
    return ((bell - _BSMNTW_MIN) / _BSMNTW_MEAN).clamp(min=0)


def clean_weight(t: Tensor) -> Tensor:
    """s^2, [B]: with it ``velocity_loss`` is ``mean |x0 - x0_target|^2``, as x0 = x_t - s v."""
    return (_wide(t) / 1000).square()


def noise_like(latents: Tensor, rows: RowGenerators) -> Tensor:
    """Standard normal noise of the shape of ``latents``, fp32, on their device; a sample's from
    its own row."""
    assert len(rows) == len(latents)  # one row would be broadcast over all of them
    return noise_of(latents.shape[1:], rows, latents.device)


def noise_of(shape: Sequence[int], rows: RowGenerators, device: torch.device) -> Tensor:
    """Standard normal noise [B, *shape], fp32; a sample's from its own row."""
    return rows.normal(shape).to(device)


def per_frame(values: Tensor, frames: Sequence[int]) -> Tensor:
    """What each chunk has, [B, chunks], for each of its frames, [B, T].

    Args:
        frames: of each chunk; T is their sum.
    """
    assert values.shape[1] == len(frames)
    return torch.cat([values[:, i : i + 1].expand(-1, n) for i, n in enumerate(frames)], dim=1)


def _levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """s and r = sqrt((1 - s)^2 + s^2), [B, 1, 1, 1, 1]."""
    s = (_wide(t) / 1000).view(-1, 1, 1, 1, 1)
    return s, ((1 - s).square() + s.square()).sqrt()


def _sample_means(value: Tensor, trained: Tensor | None) -> Tensor:
    """Mean of each sample [B], over what is trained."""
    if trained is None:
        return value.flatten(1).mean(dim=1)
    counted = trained.expand(1, *value.shape[1:]).sum()
    return (value * trained).flatten(1).sum(dim=1) / counted


def _wide(value: Tensor) -> Tensor:
    """fp32, or what it is if that is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
