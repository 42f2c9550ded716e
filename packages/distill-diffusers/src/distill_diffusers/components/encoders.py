"""Encoders of transformers, read from a pipeline folder and in memory only while they encode."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from attrs import frozen
from distill_protocols import DTYPES, ConditioningError, Precision, WeightsError
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from distill_diffusers.folders import (
    TRANSFORMERS_STEM,
    fetch,
    locate,
    module_problems,
    transformer_names,
    weight_files,
)
from distill_diffusers.kinds import load_class

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
"""One of these is in a tokenizer's folder."""
_SAMPLED_CHUNKS = 64
_CHUNK_BYTES = 1 << 16


def accept_any(encoder: nn.Module, folder: Path) -> None:
    """Check nothing of a loaded encoder."""


@frozen(kw_only=True)
class TextEncoderPart:
    """A text encoder of a pipeline folder and its tokenizer.

    Attributes:
        model: the class, ``module:Class``.
        encoder: its folder, which is also its name in ``TextEncoders``.
        tokenizer: the folder of its tokenizer.
        dtype: of its weights while it encodes.
        check: raises WeightsError where the loaded encoder would encode wrongly.
    """

    model: str
    encoder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    dtype: torch.dtype = torch.float32
    check: Callable[[nn.Module, Path], None] = accept_any

    def problems(self, folder: Path) -> Iterator[str]:
        """Yield what is missing or damaged in a pipeline folder."""
        yield from module_problems(folder / self.encoder, TRANSFORMERS_STEM)
        tokenizer = folder / self.tokenizer
        if not any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
            yield (
                f"{tokenizer} holds none of {', '.join(TOKENIZER_FILES)}, and {self.encoder}/ "
                "beside it is of no use without. Download it again"
            )

    def files(self, folder: Path) -> list[Path]:
        """List the files that an embedding depends on."""
        encoder, tokenizer = folder / self.encoder, folder / self.tokenizer
        return [
            encoder / "config.json",
            *weight_files(encoder, TRANSFORMERS_STEM),
            *sorted(path for path in tokenizer.iterdir() if path.is_file()),
        ]


def numbered_parts(source: str, classes: Sequence[str]) -> list[TextEncoderPart]:
    """Describe ``text_encoder``, ``text_encoder_2`` ... of a pipeline, those that its index has.

    Args:
        source: Diffusers folder or hub id.
        classes: ``module:Class`` of each, in order.

    Raises:
        WeightsError: no index, or a damaged one.
    """
    suffixes = ["", *(f"_{number}" for number in range(2, len(classes) + 1))]
    parts = [
        TextEncoderPart(model=model, encoder=f"text_encoder{end}", tokenizer=f"tokenizer{end}")
        for model, end in zip(classes, suffixes, strict=True)
    ]
    names = transformer_names(fetch(source, ()), [part.encoder for part in parts])
    return [part for part in parts if part.encoder in names]


@frozen(eq=False)
class LoadedEncoder:
    """A tokenizer and its encoder, of the classes that the folder names."""

    tokenizer: Any
    encoder: Any


class TextEncoders:
    """The text encoders of a pipeline folder, by the name of their folders.

    Each is in memory only while it encodes: UMT5-XXL has 11 to 23 GB, and a run encodes a handful
    of prompts before its first step. Within ``keep_loaded`` they stay.

    Args:
        source: Diffusers folder or hub id.
        parts: one for each encoder.
        settings: what else an embedding depends on (padding, precision ...); for the fingerprint.
        device: where they run.
    """

    def __init__(
        self,
        source: str,
        parts: Sequence[TextEncoderPart],
        *,
        settings: Sequence[object] = (),
        device: torch.device,
    ) -> None:
        self._source = source
        self._parts = {part.encoder: part for part in parts}
        self._settings = tuple(settings)
        self._device = device
        self._kept: dict[str, LoadedEncoder] | None = None

    @classmethod
    def single(
        cls,
        source: str,
        model: str,
        *,
        length: int,
        precision: Precision,
        device: torch.device,
        check: Callable[[nn.Module, Path], None] = accept_any,
    ) -> TextEncoders:
        """Describe the one encoder of a pipeline, whose prompts ``embed`` pads to ``length``.

        Args:
            model: its class, ``module:Class``.
            precision: of its weights while it encodes.
            check: see ``TextEncoderPart``.
        """
        part = TextEncoderPart(model=model, dtype=DTYPES[precision], check=check)
        return cls(source, [part], settings=(length, precision), device=device)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the encoders, in the order of ``parts``."""
        return tuple(self._parts)

    @contextlib.contextmanager
    def loaded(self, name: str = "text_encoder") -> Iterator[LoadedEncoder]:
        """Enter with one tokenizer and encoder in memory.

        Raises:
            WeightsError: a file is missing or damaged, or a key unmatched.
        """
        if self._kept is None:
            yield self._load(name)
            return
        if name not in self._kept:
            self._kept[name] = self._load(name)
        yield self._kept[name]

    @torch.no_grad()
    def outputs(self, name: str, prompts: Sequence[str], *, length: int | None = None) -> Any:
        """Call one encoder on prompts padded and cut to ``length`` tokens, without a mask.

        For the encoders of models that attend the padding.

        Args:
            length: tokens; None: the tokenizer's own ``model_max_length``.

        Returns:
            what the encoder gives, all hidden states with it.

        Raises:
            ConditioningError: no prompts.
            WeightsError: as ``loaded``.
        """
        with self._tokenized(name, prompts, length) as (encoder, tokens):
            return encoder(tokens.input_ids, output_hidden_states=True)

    @torch.no_grad()
    def embed(
        self, prompts: Sequence[str], length: int, *, attend_padding: bool
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts, padded and cut to ``length`` tokens, by ``text_encoder``.

        For the encoders of models that do not read the padding: what is there is 0.

        Args:
            attend_padding: whether the encoder attends it, as some pipelines let it.

        Returns:
            its last hidden states [B, L, D], and 1 at the tokens of the prompt [B, L]; both fp32.

        Raises:
            ConditioningError: no prompts.
            WeightsError: as ``loaded``.
        """
        with self._tokenized("text_encoder", prompts, length) as (encoder, tokens):
            mask = tokens.attention_mask
            output = encoder(tokens.input_ids, None if attend_padding else mask)
        # where, not a product: 0 * nan or inf of a masked position would stay nan.
        hidden = torch.where(mask[..., None] > 0, output.last_hidden_state.float(), 0.0)
        return hidden, mask.float()

    @contextlib.contextmanager
    def keep_loaded(self) -> Iterator[None]:
        """Keep each encoder in memory from its first use within to the end of the block."""
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def fingerprint(self) -> str | None:
        """Hash encoder weights, tokenizer files and settings (``_digest`` says how much of each).

        None where they are not (whole) on this machine: nothing is downloaded to be hashed.
        """
        folder = locate(self._source)
        if folder is None or any(p for part in self._parts.values() for p in part.problems(folder)):
            return None
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr(self._settings).encode())
        for part in self._parts.values():
            for file in part.files(folder):
                digest.update(file.relative_to(folder).as_posix().encode())
                digest.update(_digest(file))
        return digest.hexdigest()

    @contextlib.contextmanager
    def _tokenized(
        self, name: str, prompts: Sequence[str], length: int | None
    ) -> Iterator[tuple[Any, Any]]:
        """Enter with an encoder in memory, and the tokens of ``prompts`` and their mask."""
        if not prompts:
            raise ConditioningError("no prompts to encode; give one a sample (it may be empty)")
        with self.loaded(name) as text:
            tokens = text.tokenizer(
                list(prompts),
                padding="max_length",
                max_length=text.tokenizer.model_max_length if length is None else length,
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            yield text.encoder, tokens.to(self._device)

    def _load(self, name: str) -> LoadedEncoder:
        part = self._parts[name]
        folder = fetch(self._source, (part.encoder, part.tokenizer))
        for problem in part.problems(folder):
            raise WeightsError(
                f"{self._source} cannot encode a prompt: {problem}; or store the embeddings (and "
                "the negative one) in the data set"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder / part.tokenizer, trust_remote_code=False)
        encoder = load_encoder(load_class(part.model), folder / part.encoder, part.dtype)
        part.check(encoder, folder / part.encoder)
        return LoadedEncoder(tokenizer, encoder.to(self._device))


def load_encoder(model_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load an encoder of transformers in eval mode, with every key found.

    Raises:
        WeightsError: unmatched keys, or a damaged file.
    """
    try:
        with _without_progress_bar():
            # A .bin file is a pickle, which can run code, and is never read.
            loaded = model_class.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        encoder, info = cast(tuple[nn.Module, dict[str, Iterable[Any]]], loaded)
    except Exception as error:  # safetensors, OSError, ValueError: all mean unreadable files
        raise WeightsError(f"{folder} cannot be read: {error}. Download it again") from error
    unmatched = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if unmatched:
        raise WeightsError(f"{folder}: the keys do not match {model_class.__name__}: {unmatched}")
    return encoder.eval().requires_grad_(False)


def _digest(file: Path) -> bytes:
    """Hash the whole file up to 64 MiB; of a larger one its size and 64 chunks spread over it.

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
            for index in range(_SAMPLED_CHUNKS):
                stream.seek((size - _CHUNK_BYTES) * index // (_SAMPLED_CHUNKS - 1))
                digest.update(stream.read(_CHUNK_BYTES))
    return digest.digest()


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Hide transformers' bar of read weights, which would write over the training's own."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
