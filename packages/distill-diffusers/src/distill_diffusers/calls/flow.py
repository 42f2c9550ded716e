"""Flow matching, as pure functions (Lipman et al. 2023; SD3, Esser et al. 2024, section 2).

``x_t = (1 - s) x0 + s eps`` and ``v = eps - x0`` with s = t / 1000. Latents are [B, C, T, H, W]
and t is [B], one time a sample, or [B, T], one a frame. All is computed in fp32, or in fp64 where
an input is fp64.
"""

from __future__ import annotations

import torch
from distill_protocols import ContractError, PredType
from torch import Tensor

from distill_diffusers.kinds import TRAIN_STEPS


def sigma_of(t: Tensor, like: Tensor) -> Tensor:
    """Return s = t / 1000, shaped to multiply ``like``: [B, 1, 1, 1, 1], or [B, 1, T, 1, 1].

    Raises:
        ContractError: t is of 16 bits or an integer, or neither [B] nor [B, T].
    """
    if not t.is_floating_point() or t.dtype in (torch.float16, torch.bfloat16):
        raise ContractError(
            f"t has dtype {t.dtype}, it must be float32 or float64: 16 bits and integers round "
            "times such as 833.33 (bf16 gives 832). Keep t in float32"
        )
    if like.dim() == 5 and t.shape == (like.shape[0], like.shape[2]):
        return (t / TRAIN_STEPS)[:, None, :, None, None]
    if t.shape != (like.shape[0],):
        raise ContractError(
            f"t has shape {list(t.shape)} for latents {list(like.shape)}; it must be [B], one time "
            "a sample, or [B, T], one a frame. Use t.expand(B) for one common time"
        )
    return (t / TRAIN_STEPS).reshape(-1, *[1] * (like.dim() - 1))


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mix x_t: exactly ``x0`` at t = 0 and exactly ``noise`` at t = 1000."""
    x0, noise = widen(x0), widen(noise)
    sigma = sigma_of(t, x0)
    return (1 - sigma) * x0 + sigma * noise


def target(x0: Tensor, noise: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
    """Return what a model that predicts ``pred_type`` should give at (x0, noise, t)."""
    x0, noise = widen(x0), widen(noise)
    sigma_of(t, x0)
    if pred_type == "v":
        return noise - x0
    return x0 if pred_type == "x0" else noise


def pred_to_x0(pred: Tensor, x_t: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
    """Compute clean latents from a prediction.

    ``x0 = x_t - s v``; ``x0 = (x_t - s eps) / (1 - s)``, which has no answer at t = 1000, where x_t
    is the noise itself.

    Raises:
        ValueError: ``pred_type="eps"`` at t = 1000.
    """
    pred, x_t = widen(pred), widen(x_t)
    sigma = sigma_of(t, x_t)
    if pred_type == "x0":
        return pred
    if pred_type == "v":
        return x_t - sigma * pred
    _refuse_where(sigma == 1, "eps to x0", "t = 1000", "x_t is the noise and holds nothing of x0")
    return (x_t - sigma * pred) / (1 - sigma)


def pred_to_v(pred: Tensor, x_t: Tensor, t: Tensor, pred_type: PredType = "x0") -> Tensor:
    """Compute the velocity from a prediction: ``(x_t - x0) / s``, or ``(eps - x_t) / (1 - s)``.

    Nothing is clamped: a clamped sigma would return a wrong velocity without a word.

    Raises:
        ValueError: ``"x0"`` at t = 0, ``"eps"`` at t = 1000: any velocity would fit there.
    """
    pred, x_t = widen(pred), widen(x_t)
    sigma = sigma_of(t, x_t)
    if pred_type == "v":
        return pred
    if pred_type == "x0":
        _refuse_where(sigma == 0, "x0 to v", "t = 0", "x_t is x0 whatever the velocity")
        return (x_t - pred) / sigma
    _refuse_where(sigma == 1, "eps to v", "t = 1000", "x_t is eps whatever the velocity")
    return (pred - x_t) / (1 - sigma)


def v_to_pred(v: Tensor, x_t: Tensor, t: Tensor, pred_type: PredType) -> Tensor:
    """Convert v to ``pred_type``: ``x0 = x_t - s v``, ``eps = x_t + (1 - s) v``."""
    v, x_t = widen(v), widen(x_t)
    sigma = sigma_of(t, x_t)
    if pred_type == "v":
        return v
    return x_t - sigma * v if pred_type == "x0" else x_t + (1 - sigma) * v


def guide(cond: Tensor, uncond: Tensor, w: float) -> Tensor:
    """Combine by classifier-free guidance: ``u + w (c - u)`` (Ho & Salimans 2022, as in Imagen)."""
    cond, uncond = widen(cond), widen(uncond)
    return uncond + w * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, factor: float) -> Tensor:
    """Pull the spread of ``guided`` back to that of ``cond``, a sample at a time.

    ``factor guided std(cond) / std(guided) + (1 - factor) guided`` (Lin et al. 2024, "Common
    Diffusion Noise Schedules and Sample Steps are Flawed", eqs. 15 and 16).

    Args:
        guided: u + w (c - u) [B, ...].
        cond: c [B, ...].
        factor: phi, from 0 (nothing changes) to 1.
    """
    rest = list(range(1, guided.dim()))
    spread = cond.std(dim=rest, keepdim=True) / guided.std(dim=rest, keepdim=True)
    return factor * (guided * spread) + (1 - factor) * guided


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in fp32; fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _refuse_where(mask: Tensor, what: str, at: str, why: str) -> None:
    if bool(mask.any()):
        raise ValueError(f"{what} at {at} has no answer: {why}. Keep t away from that end")
