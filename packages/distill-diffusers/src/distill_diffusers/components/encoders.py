"""VAE, text encoder and tokenizer of one pipeline folder, read when they are needed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from distill_adapters_wan.config import WanPipelineConfig
from distill_protocols import DTYPES, ConditioningError, WeightsError
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from distill_diffusers.folders import (
    TRANSFORMERS_STEM,
    fetch,
    locate,
    text_problems,
    weight_files,
)
from distill_diffusers.weights.modules import load_module

_SAMPLED = 64
_CHUNK = 1 << 16
_PIXELS_A_CALL = 1 << 22
"""Pixels (frames x height x width) decoded at once: a real clip goes alone, tiny ones together."""


class VideoCodec:
    """The VAE: pixels to raw latents and back.

    Args:
        source: Diffusers folder or hub id.
        device: where it runs, in fp32 (16 bits cost visible quality in Wan's decoder).
    """

    def __init__(self, source: str, *, device: torch.device) -> None:
        self._source = source
        self._device = device
        self._vae: Any = None

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Raw latents [B, C, T, H, W], the posterior's mode, of clips [B, 3, F, H, W] in [0, 1]."""
        pixels = video.float() * 2 - 1
        vae = self._loaded()
        parts = [
            vae.encode(part.to(self._device)).latent_dist.mode()
            for part in pixels.split(_clips_a_call(pixels.shape[2:].numel()))
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, 3, F, H, W] in [0, 1] of raw latents, as WanPipeline makes them."""
        vae = self._loaded()
        facts = vae.config
        cells = latents.shape[2:].numel() * facts.scale_factor_temporal
        parts = [
            vae.decode(part.to(self._device, torch.float32)).sample
            for part in latents.split(_clips_a_call(cells * facts.scale_factor_spatial**2))
        ]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def free(self) -> None:
        """Drop the VAE's weights; the next use reads them again."""
        self._vae = None

    def _loaded(self) -> Any:
        if self._vae is None:
            folder = fetch(self._source, ("vae",)) / "vae"
            self._vae = load_module(
                AutoencoderKLWan, folder, dtype=torch.float32, device=self._device
            ).requires_grad_(False)
        return self._vae


class TextSide:
    """UMT5 and its tokenizer: prompts to embeddings.

    They are in memory only while they encode (``kept`` makes that longer): UMT5-XXL has 11 to
    23 GB, and a run encodes a handful of prompts before its first step.

    Args:
        source: Diffusers folder or hub id.
        config: length of the padding and precision of the encoder.
        device: where the encoder runs.
    """

    def __init__(self, source: str, config: WanPipelineConfig, *, device: torch.device) -> None:
        self._source = source
        self._config = config
        self._device = device
        self._parts: tuple[Any, Any] | None = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, max_sequence_length, D] fp32, exactly 0 beyond each prompt's own length.

        As ``WanPipeline.encode_prompt`` does, its clean-up of the prompt included.
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        if not prompts:
            raise ConditioningError("no prompts to encode; give one a sample (it may be empty)")
        with self.kept() as (tokenizer, encoder):
            return self._encoded(tokenizer, encoder, [prompt_clean(p) for p in prompts])

    def _encoded(self, tokenizer: Any, encoder: Any, prompts: list[str]) -> Tensor:
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=self._config.max_sequence_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self._device)
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()
        # where, not a product: 0 * nan or inf of a masked position would stay nan.
        return torch.where(tokens.attention_mask[..., None] > 0, hidden, 0.0)

    @contextlib.contextmanager
    def kept(self) -> Iterator[tuple[Any, Any]]:
        """Within: tokenizer and encoder stay loaded from one ``encode`` to the next."""
        if self._parts is not None:
            yield self._parts
            return
        self._parts = self._load()
        try:
            yield self._parts
        finally:
            self._parts = None

    def fingerprint(self) -> str | None:
        """Hash of encoder weights, tokenizer files and settings; see ``_digest`` for its reach.

        None where they are not (whole) on this machine: nothing is downloaded to be hashed.
        """
        folder = locate(self._source)
        if folder is None or any(text_problems(folder)):
            return None
        digest = hashlib.blake2b(digest_size=16)
        settings = (self._config.max_sequence_length, self._config.text_encoder_precision)
        digest.update(repr(settings).encode())
        encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
        files = [encoder / "config.json", *weight_files(encoder, TRANSFORMERS_STEM)]
        files += sorted(path for path in tokenizer.iterdir() if path.is_file())
        for file in files:
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(_digest(file))
        return digest.hexdigest()

    def _load(self) -> tuple[Any, Any]:
        folder = fetch(self._source, ("text_encoder", "tokenizer"))
        for problem in text_problems(folder):
            raise WeightsError(
                f"{self._source} cannot encode a prompt: {problem}; or store the embeddings (and "
                "the negative one) in the data set"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
        encoder = load_text_encoder(
            folder / "text_encoder", DTYPES[self._config.text_encoder_precision]
        )
        return tokenizer, encoder.to(self._device)


def load_text_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """UMT5 as ``load_encoder`` loads it, with its embedding tied.

    Some transformers 5 builds left ``embed_tokens`` untied or zero (transformers PR 43880), and
    then every prompt means the same; so the tie is asserted.

    Raises:
        WeightsError: unmatched keys, a damaged file, or an embedding that is not tied.
    """
    encoder = load_encoder(UMT5EncoderModel, folder, dtype)
    tokens, shared = encoder.encoder.embed_tokens.weight, encoder.shared.weight
    if not torch.equal(tokens, shared) or not bool(shared.any()):
        raise WeightsError(
            f"{folder}: encoder.embed_tokens differs from shared after loading (or is all zero); "
            "they must be one table, or every prompt encodes alike. This is a problem of some "
            "transformers 5 builds (PR 43880): install another version"
        )
    return encoder


def load_encoder(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """An encoder of transformers in eval mode, with every key found.

    Raises:
        WeightsError: unmatched keys, or a damaged file.
    """
    try:
        with _without_progress_bar():
            # A .bin file is a pickle, and never read.
            loaded = model_class.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        encoder, info = cast(tuple[Any, dict[str, Iterable[Any]]], loaded)
    except Exception as error:  # safetensors, OSError, ValueError: all mean unreadable files
        raise WeightsError(f"{folder} cannot be read: {error}. Download it again") from error
    unmatched = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if unmatched:
        raise WeightsError(f"{folder}: the keys do not match {model_class.__name__}: {unmatched}")
    return encoder.eval().requires_grad_(False)


def _digest(file: Path) -> bytes:
    """Of the whole file up to 64 MiB; beyond, of its size and 64 chunks spread over it.

    UMT5-XXL has 11 GB or more: reading it all at every start would cost a minute, and two
    trainings of one encoder differ in every chunk.
    """
    digest = hashlib.blake2b(digest_size=16)
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        if size <= 1 << 26:
            digest.update(stream.read())
        else:
            for index in range(_SAMPLED):
                stream.seek((size - _CHUNK) * index // (_SAMPLED - 1))
                digest.update(stream.read(_CHUNK))
    return digest.digest()


def _clips_a_call(pixels_a_clip: int) -> int:
    return max(1, _PIXELS_A_CALL // pixels_a_clip)


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """transformers' bar of read weights would write over the training's own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
