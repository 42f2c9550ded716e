"""Noise schedule, latent statistics, layout, encoder and decoder."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_conformance.adapter_case import ROWS, AdapterCase, normal
from distill_conformance.adapter_checks.calls import FEW
from distill_conformance.failures import require, require_equal, require_shape


def check_noise_ends(case: AdapterCase) -> None:
    """``add_noise`` is exactly x0 at t = 0 and exactly the noise at t = 1000.

    A sampler starts at pure noise; a rest of the data there is a difference between training and
    sampling.
    """
    adapter = case.adapter

    @FEW
    @given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
    def check(seed: int, scale: float) -> None:
        x0, noise = scale * case.noise(seed=seed), case.noise(seed=seed + 1)
        require_equal(adapter.add_noise(x0, noise, torch.zeros(ROWS)), x0, "x_t at t = 0")
        end = torch.full((ROWS,), 1000.0)
        require_equal(adapter.add_noise(x0, noise, end), noise, "x_t at t = 1000")

    check()


def check_conversions(case: AdapterCase) -> None:
    """``pred_to_x0`` of ``target`` is x0, for each stated prediction type, at every noise level.

    Otherwise a perfect model would not give the data back.
    """
    adapter = case.adapter

    @FEW
    @given(seed=st.integers(0, 2**31), low=st.floats(1, 900), high=st.floats(1, 900))
    def check(seed: int, low: float, high: float) -> None:
        x0, noise = case.noise(seed=seed), case.noise(seed=seed + 1)
        t = torch.tensor([low, high], dtype=torch.float32)
        x_t = adapter.add_noise(x0, noise, t)
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        case.require_close(x_t, (1 - s) * x0 + s * noise, "x_t = (1 - s) x0 + s eps")
        for kind in sorted(case.capabilities.supported_pred_types):
            target = adapter.target(x0, noise, t, kind)
            found = adapter.pred_to_x0(target, x_t, t, kind)
            case.require_close(found, x0, f"x0 of the target of type {kind} at t = {t.tolist()}")
        case.require_close(adapter.target(x0, noise, t), noise - x0, "the target of type v")

    check()


def check_normalization(case: AdapterCase) -> None:
    """``denormalize_latents`` undoes ``normalize_latents``, a scale and a shift of each channel.

    Otherwise decoded clips have other colours than the data.
    """
    adapter = case.adapter

    @FEW
    @given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
    def check(seed: int, scale: float) -> None:
        z = scale * case.noise(seed=seed)
        normalized = adapter.normalize_latents(z)
        case.require_close(adapter.denormalize_latents(normalized), z, "denormalize(normalize(z))")
        back = adapter.normalize_latents(adapter.denormalize_latents(z))
        case.require_close(back, z, "normalize(denormalize(z))")
        # Affine by channel: the difference of two latents is scaled alone.
        zero = adapter.normalize_latents(torch.zeros_like(z))
        double = adapter.normalize_latents(2 * z)
        case.require_close(double - zero, 2 * (normalized - zero), "normalize is affine")

    check()


def check_layout(case: AdapterCase) -> None:
    """``from_model_layout`` undoes ``to_model_layout``.

    Otherwise the prediction and x_t are of different pixels.
    """
    latents = case.noise()
    back = case.adapter.from_model_layout(case.adapter.to_model_layout(latents))
    require_equal(back, latents, "from_model_layout(to_model_layout(x))")


def check_latent_shape(case: AdapterCase) -> None:
    """The plugin and the adapter agree on the shape of latents.

    A data set is checked against the plugin's before the run and read with the adapter's.
    """
    planned = case.plugin.latent_shape(case.config, source=case.components)
    loaded = case.adapter.latent_shape
    require(
        planned is None or tuple(planned) == tuple(loaded),
        f"plugin.latent_shape is {planned}, and adapter.latent_shape is {loaded}",
    )
    tokens = case.plugin.latent_tokens(case.config, source=case.components)
    require(tokens is None or tokens > 0, f"latent_tokens is {tokens}; it counts tokens")


def check_codec(case: AdapterCase) -> None:
    """``decode`` gives clips in [0, 1] without gradient, and ``encode`` raw latents of them.

    Data preparation writes the one, validation shows the other.
    """
    case.need("supports_decode")
    latents = case.noise().requires_grad_()
    clips = case.adapter.decode(latents)
    require(clips.dim() == 5 and clips.shape[:2] == (ROWS, 3), f"clips are {list(clips.shape)}")
    require(not clips.requires_grad, "decode keeps a graph")
    require(
        bool((clips >= 0).all() and (clips <= 1).all()),
        f"clips reach from {float(clips.min()):g} to {float(clips.max()):g}, beyond [0, 1]",
    )
    for i in range(ROWS):
        case.require_close(
            clips[i : i + 1], case.adapter.decode(latents[i : i + 1]), f"clip {i} in a batch"
        )
    raw = case.adapter.encode(clips)
    require_shape(raw, (ROWS, *case.adapter.latent_shape), "raw latents of a decoded clip")
    require(not raw.requires_grad, "encode keeps a graph")
    other = case.adapter.encode(normal(*clips.shape, seed=3).sigmoid())
    require(not torch.equal(raw, other), "encode gives the same for two clips")
