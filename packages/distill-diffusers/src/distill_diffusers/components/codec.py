"""The VAE: pixels to raw latents and back.

Letters: B batch, C channels, F frames, T latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from distill_diffusers.folders import fetch
from distill_diffusers.kinds import load_class
from distill_diffusers.weights.modules import load_module

PIXELS_A_CALL = 1 << 22
"""Frames x height x width coded in one call: a real clip goes alone, tiny ones together."""


class VideoCodec:
    """A video VAE of diffusers, in fp32: 16 bits cost visible quality in Wan's decoder.

    ``encode_part`` and ``decode_part`` say how the VAE class is called; a family overrides them
    where its class is called otherwise (an image VAE, a decoder with a time).

    Args:
        vae: the class, ``module:Class``.
        source: Diffusers folder or hub id.
        strides: (temporal, spatial): pixel frames a latent frame, pixels a latent row.
        device: where it runs.
    """

    def __init__(
        self, vae: str, source: str, *, strides: tuple[int, int], device: torch.device
    ) -> None:
        self._class = vae
        self._source = source
        self._strides = strides
        self._device = device
        self._vae: Any = None

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode clips [B, 3, F, H_px, W_px] in [0, 1] to raw latents [B, C, T, H, W]."""
        pixels = video.float() * 2 - 1
        vae = self._loaded()
        clips = _clips_a_call(pixels.shape[2:].numel())
        return torch.cat(
            [self.encode_part(vae, part.to(self._device)) for part in pixels.split(clips)]
        )

    def encode_each(self, clips: Tensor) -> Tensor:
        """Encode clips one at a time, as pipelines encode pictures: several together round
        otherwise."""
        return torch.cat([self.encode(clip) for clip in clips.split(1)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode raw latents to clips [B, 3, F, H_px, W_px] in [0, 1], as diffusers does."""
        vae = self._loaded()
        time, space = self._strides
        clips = _clips_a_call(latents.shape[2:].numel() * time * space**2)
        parts = [
            self.decode_part(vae, part.to(self._device, torch.float32))
            for part in latents.split(clips)
        ]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def decode_stream(
        self,
        latents: Iterable[Tensor],
        decode_chunks: Callable[[Any, Iterable[Tensor]], Iterator[Tensor]],
    ) -> Generator[Tensor, None, None]:
        """Decode a video chunk by chunk: frames [B, 3, F, H_px, W_px] in [0, 1] of each.

        Args:
            latents: raw, of each chunk [B, C, T, H, W].
            decode_chunks: of the VAE's class, as ``decode_part`` for chunks after each other.
        """
        chunks = (chunk.to(self._device, torch.float32) for chunk in latents)
        frames = decode_chunks(self._loaded(), chunks)
        while True:
            with torch.no_grad():  # not around the yield, where the caller's own code runs
                part = next(frames, None)
            if part is None:
                return
            yield (part / 2 + 0.5).clamp(0, 1)

    def encode_part(self, vae: Any, pixels: Tensor) -> Tensor:
        """Encode clips in [-1, 1] in one call; the mode of the posterior."""
        return vae.encode(pixels).latent_dist.mode()

    def decode_part(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode raw latents in one call to clips in about [-1, 1]."""
        return vae.decode(latents).sample

    @property
    def source(self) -> str:
        """Folder or hub id of the VAE."""
        return self._source

    def free(self) -> None:
        """Drop the VAE's weights; the next use reads them again."""
        self._vae = None

    def _loaded(self) -> Any:
        if self._vae is None:
            folder = fetch(self._source, ("vae",)) / "vae"
            self._vae = load_module(
                load_class(self._class), folder, dtype=torch.float32, device=self._device
            ).requires_grad_(False)
        return self._vae


class ImageCodec(VideoCodec):
    """An image VAE of diffusers: a clip is one frame, and T = 1."""

    def encode_part(self, vae: Any, pixels: Tensor) -> Tensor:
        return super().encode_part(vae, pixels.squeeze(2)).unsqueeze(2)

    def decode_part(self, vae: Any, latents: Tensor) -> Tensor:
        return super().decode_part(vae, latents.squeeze(2)).unsqueeze(2)


def _clips_a_call(pixels_a_clip: int) -> int:
    return max(1, PIXELS_A_CALL // pixels_a_clip)
