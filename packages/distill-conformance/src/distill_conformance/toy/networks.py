"""The networks of the toy family, its sizes and its settings."""

from __future__ import annotations

from collections.abc import (
    Sequence,
)

import torch
from attrs import field, frozen
from distill_protocols import (
    Capabilities,
    Fingerprint,
)
from torch import Tensor, nn

LATENT_SHAPE = (3, 2, 4, 4)
CLIP, SOUND = "clip", "sound"
"""Names of the parts of latents, where there are two."""
SOUND_SHAPE = (3, 5, 1, 2)
SOUND_WEIGHT = 0.25
TEXT_DIM = 5
WIDTH = 24
MEAN, STD = 0.5, 2.0
LATENT_FINGERPRINT: Fingerprint = {"vae.statistics": f"{MEAN:g}, {STD:g}"}
CONDITION_FINGERPRINT: Fingerprint = {"text_encoder.weights": "a function of the prompt"}
CAPABILITIES = Capabilities(
    supports_cfg=True,
    supports_decode=True,
    supports_exits=True,
    supports_features=True,
    supports_frame_times=True,
    supports_jvp=True,
    supported_pred_types=frozenset({"v", "x0", "eps"}),
)
"""Of a run without causal roles."""
JOINT = {
    "supports_latent_parts": True,
    "supports_exits": False,
    "supports_features": False,
    "supports_frame_times": False,
    "supports_jvp": False,
}
"""What is otherwise in a run of clips with sound."""


@frozen(kw_only=True)
class ToyConfig:
    """A run of toy models.

    Attributes:
        causal_roles: roles that make frame after frame, each a chunk of its own.
        sound: whether clips have a second part, ``SOUND``, beside ``CLIP``.
    """

    causal_roles: frozenset[str] = field(default=frozenset(), converter=frozenset)
    sound: bool = False


class ToyNet(nn.Module):
    """v of a network of one hidden layer that works on each pixel by itself.

    It reads x_t, t, the text, and of a causal role the mean of the frames that are past (0 where
    none is given).
    """

    def __init__(self) -> None:
        super().__init__()
        channels = LATENT_SHAPE[0]
        self.inner = nn.Linear(2 * channels + 1 + TEXT_DIM, WIDTH)
        self.outer = nn.Linear(WIDTH, channels)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, past: Tensor | None = None) -> Tensor:
        """v [B, C, T, H, W] at t [B] or [B, T], from ``past`` like ``x_t``; text is [B, TEXT_DIM],
        or one a frame."""
        return self.velocity(self.features(x_t, t, text, past))

    def features(self, x_t: Tensor, t: Tensor, text: Tensor, past: Tensor | None = None) -> Tensor:
        """[B, WIDTH, T, H, W] of its only block."""
        past = torch.zeros_like(x_t) if past is None else past
        pixels = torch.cat([x_t, past], dim=1).movedim(1, -1)
        size = pixels.shape[:-1]
        times = (t if t.dim() == 2 else t[:, None])[:, :, None, None, None] / 1000
        texts = (text if text.dim() == 3 else text[:, None])[:, :, None, None]
        rows = [times.expand(*size, 1), texts.expand(*size, text.shape[-1])]
        return torch.tanh(self.inner(torch.cat([pixels, *rows], -1))).movedim(-1, 1)

    def velocity(self, features: Tensor) -> Tensor:
        """v from ``features``."""
        return self.outer(features.movedim(1, -1)).movedim(-1, 1)


class ToyExits(nn.Module):
    """What exit steps [B, 1] or [B, T] add to the text: [B, 1 or T, TEXT_DIM]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(count, TEXT_DIM))

    def forward(self, exits: Tensor) -> Tensor:
        return nn.functional.embedding(exits, self.rows)


class ToyHeads(nn.Module):
    """A logit of a clip for each block, from the means of its features and of their squares."""

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.outer = nn.ModuleList(nn.Linear(2 * WIDTH, 1) for _ in range(blocks))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B, heads] of features [B, WIDTH, T, H, W], one a head."""
        cells = [block.flatten(2) for block in features]
        moments = [torch.cat([c.mean(dim=2), c.square().mean(dim=2)], dim=1) for c in cells]
        return torch.cat([head(m) for head, m in zip(self.outer, moments, strict=True)], dim=1)
