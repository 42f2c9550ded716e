"""The maths of the methods: pure functions, each written once.

Letters: B batch, C channels, T latent frames, H and W latent height and width. Latents are
[B, C, T, H, W], t is [B] in [0, 1000], ``x_t = (1 - s) x0 + s eps`` with ``s = t / 1000`` and
``v = eps - x0``. Everything is computed in fp32 or wider. Guidance and the conversions between
v, x0 and eps belong to the adapter.
"""

from __future__ import annotations

import math

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
        weight: one factor a sample, [B]; None means 1.
        trained: 1 where the model predicts and 0 where the condition gave what is there
            (``ImageConditioning.trained_frames``), [1, 1, T, 1, 1]; the mean is over the former.
    """
    error = (_wide(pred) - _wide(target)).square()
    if weight is None and trained is None:
        return error.mean()
    means = _sample_means(error, trained)
    return (means if weight is None else means * weight).mean()


def timesteps_within(quantiles: Tensor, time: TimeSampling, within: Range) -> Tensor:
    """t of ``sample_timesteps``' distribution, given that it lies in ``within``: fp32 [B].

    Args:
        quantiles: uniform in [0, 1), [B]; t rises with them.
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


def sample_timesteps(time: TimeSampling, rows: RowGenerators) -> Tensor:
    """``t = clamp(1000 S_k(u), t_min, t_max)`` of each row: fp32 [B] on the generators' device.

    u is uniform, or ``sigmoid(N(mean, std))`` (SD3, Esser et al. 2024, eq. 19 and 23).
    """
    if time.distribution == "uniform":
        u = rows.uniform()
    else:
        u = torch.sigmoid(time.mean + time.std * rows.normal())
    return (1000 * shift_sigma(u, time.shift)).clamp(time.t_min, time.t_max)


def bsmntw_weight(t: Tensor) -> Tensor:
    """Bell-shaped timestep weight of mean 1, [B] (DiffSynth-Studio ``flow_match.py``).

    ``w = (exp(-2 ((t - 500) / 1000)^2) - exp(-1/2)) / c``, with c such that the mean over t in
    [0, 1000] is 1. It is 0 at t = 0 and at t = 1000. DiffSynth normalises over its (shifted)
    table of timesteps instead, which differs by one constant factor.
    """
    bell = torch.exp(-2 * ((_wide(t) - 500) / 1000).square())
    return ((bell - _BSMNTW_MIN) / _BSMNTW_MEAN).clamp(min=0)


def noise_like(latents: Tensor, rows: RowGenerators) -> Tensor:
    """Standard normal noise of the shape of ``latents``, fp32, on their device; a sample's from
    its own row."""
    assert len(rows) == len(latents)  # one row would be broadcast over all of them
    return rows.normal(latents.shape[1:]).to(latents.device)


def _sample_means(value: Tensor, trained: Tensor | None) -> Tensor:
    """Mean of each sample [B], over what is trained."""
    if trained is None:
        return value.flatten(1).mean(dim=1)
    counted = trained.expand(1, *value.shape[1:]).sum()
    return (value * trained).flatten(1).sum(dim=1) / counted


def _wide(value: Tensor) -> Tensor:
    """fp32, or what it is if that is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
