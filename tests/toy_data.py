"""Small data sets and an encoder that counts its calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from distill_conditioning import ShardWriter
from distill_protocols import Condition
from torch import Tensor

SHAPE = (2, 1, 2, 2)
TEXT = (3, 4)
FINGERPRINT = "encoder-a"
"""Hash of the weights of a text encoder."""


def embedding(text: str) -> Tensor:
    """[1, L, D]: another one for each text, never zero."""
    generator = torch.Generator().manual_seed(sum(map(ord, text)) + 1000 * len(text))
    return torch.randn(1, *TEXT, generator=generator)


class CountingEncoder:
    """An adapter's encoding side, without a model.

    ``calls`` lists every text that was encoded, ``loads`` counts the loads of the text encoder.
    """

    images = None

    def __init__(self, fingerprint: str | None = FINGERPRINT) -> None:
        self.fingerprint = fingerprint
        self.calls: list[str] = []
        self.loads = 0
        self._kept = False

    @contextmanager
    def keep_encoders_loaded(self) -> Iterator[None]:
        self.loads += 1
        self._kept = True
        yield
        self._kept = False

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        self.calls += raw_cond
        self.loads += not self._kept
        return Condition({"text": torch.cat([embedding(text) for text in raw_cond])})

    def encode_neg_condition(self, raw_neg_cond: str) -> Condition:
        self.calls.append(raw_neg_cond)
        self.loads += not self._kept
        return Condition({"text": -embedding(raw_neg_cond)})

    def condition_fingerprint(self) -> Mapping[str, str]:
        return {} if self.fingerprint is None else {"text_encoder.weights": self.fingerprint}

    def latent_fingerprint(self) -> Mapping[str, str]:
        return {"vae.weights": "vae-a"}

    def encode(self, video: Tensor) -> Tensor:
        # [B, 3, F, H, W] -> [B, 2, F, H / 2, W / 2]
        return 8 * video[:, :2, :, ::2, ::2] - 4


def write_dataset(
    folder: Path,
    samples: int,
    *,
    shard_bytes: int = 150,
    negative: str | None = "",
    captions: int = 3,
) -> Path:
    """Sample i: latents of the value i (exact in float16), caption ``word <i % captions>``."""
    latents = torch.arange(samples).view(-1, 1, 1, 1, 1).expand(-1, *SHAPE).float()
    words = [f"word {i % captions}" for i in range(samples)]
    encoder = CountingEncoder()
    fingerprint = encoder.condition_fingerprint()
    with ShardWriter(folder, fingerprint=fingerprint, shard_bytes=shard_bytes) as writer:
        if negative is not None:
            writer.set_negative(negative, encoder.encode_neg_condition(negative))
        ids = [f"clip-{i}" for i in range(samples)]
        writer.add(ids, words, latents, encoder.encode_condition(words))
    return folder
