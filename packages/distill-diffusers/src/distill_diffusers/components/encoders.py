"""Encoders of transformers, read from a pipeline folder and in memory only while they encode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from attrs import frozen
from distill_protocols import DTYPES, CaptionTokens, ConditioningError, Precision, WeightsError
from distill_protocols.plugins import EMPTY
from distill_runtime import UnreadableFileError, as_count, read_json_object
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from distill_diffusers.building import limited_building
from distill_diffusers.fingerprints import condition_fingerprint, text_settings
from distill_diffusers.folders import (
    TRANSFORMERS_STEM,
    fetch,
    module_problems,
    tokenizer_problem,
    transformer_names,
)
from distill_diffusers.kinds import load_class
from distill_diffusers.model_configs import read_config

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files whose entries are no words; transformers prints names that it does not know."""
MAX_TOKENS = 100_000
"""Of a prompt."""


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
        if problem := tokenizer_problem(folder / self.tokenizer):
            yield (
                f"{problem}, and {self.encoder}/ beside it is of no use without. Download it again"
            )


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

    tokenizer: PreTrainedTokenizerBase
    encoder: Any


class TextEncoders:
    """The text encoders of a pipeline folder, by the name of their folders.

    Each is in memory only while it encodes: UMT5-XXL has 11 to 23 GB, and a run encodes a handful
    of prompts before its first step. Within ``keep_loaded`` they stay.

    Args:
        source: Diffusers folder or hub id.
        parts: one for each encoder.
        settings: what else an embedding depends on (precision, length ...), by entry of the
            fingerprint.
        device: where they run.
    """

    def __init__(
        self,
        source: str,
        parts: Sequence[TextEncoderPart],
        *,
        settings: Mapping[str, object] = EMPTY,
        device: torch.device,
    ) -> None:
        self._source = source
        self._parts = {part.encoder: part for part in parts}
        self._settings = settings
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
        return cls(source, [part], settings=text_settings(length, precision), device=device)

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
        self,
        prompts: Sequence[str],
        length: int,
        *,
        attend_padding: bool,
        name: str = "text_encoder",
        layer: int | None = None,
        skip: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts, padded and cut to ``length`` tokens.

        For the encoders of models that do not read the padding: what is there is 0.

        Args:
            attend_padding: whether the encoder attends it, as some pipelines let it.
            name: of the encoder.
            layer: which of its hidden states, as an index of their list; None: the last, after the
                encoder's own norm.
            skip: tokens to leave out in front, of a template that prompts stand in; ``length``
                counts without them.

        Returns:
            hidden states [B, L, D], and 1 at the tokens of the prompt [B, L]; both fp32.

        Raises:
            ConditioningError: no prompts.
            WeightsError: as ``loaded``.
        """
        with self._tokenized(name, prompts, skip + length) as (encoder, tokens):
            mask = tokens.attention_mask
            output = encoder(
                tokens.input_ids,
                None if attend_padding else mask,
                output_hidden_states=layer is not None,
            )
        hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
        return without_padding(hidden[:, skip:], mask[:, skip:])

    @torch.no_grad()
    def embed_each(
        self,
        prompts: Sequence[str],
        length: int,
        embed: Callable[[LoadedEncoder, str, torch.device], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts one at a time by ``text_encoder``: a row depends on its prompt alone.

        Args:
            embed: gives the hidden states [K, D] of one prompt, K at most ``length``; the device is
                the encoder's.

        Returns:
            hidden states [B, L, D] with L = ``length``, 0 beyond the prompt, and 1 at its tokens
            [B, L]; both fp32.

        Raises:
            ConditioningError: no prompts.
            WeightsError: as ``loaded``.
        """
        _require_prompts(prompts)
        with self.loaded() as text:
            rows = [embed(text, prompt, self._device).float() for prompt in prompts]
        hidden = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
        counts = torch.tensor([len(row) for row in rows], device=hidden.device)
        mask = torch.arange(length, device=hidden.device) < counts[:, None]
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

    def fingerprint(self) -> dict[str, str]:
        """Name encoder weights, tokenizers and settings (see ``distill_diffusers.fingerprints``).

        Empty where they are not (whole) on this machine: nothing is downloaded to be hashed.
        """
        parts = [(part.encoder, part.tokenizer) for part in self._parts.values()]
        return condition_fingerprint(self._source, parts, self._settings)

    @contextlib.contextmanager
    def _tokenized(
        self, name: str, prompts: Sequence[str], length: int | None
    ) -> Iterator[tuple[Any, Any]]:
        """Enter with an encoder in memory, and the tokens of ``prompts`` and their mask."""
        _require_prompts(prompts)
        with self.loaded(name) as text:
            if length is None:
                length = self._longest_prompt(name, text.tokenizer.model_max_length)
            tokens = text.tokenizer(
                list(prompts),
                padding="max_length",
                max_length=length,
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            yield text.encoder, tokens.to(self._device)

    def _longest_prompt(self, name: str, stated: object) -> int:
        try:
            return as_count(stated, least=1, most=MAX_TOKENS)
        except ValueError as error:
            raise WeightsError(
                f"{self._source}: the tokenizer of {name} states {str(stated)[:40]!a} for the "
                f"length of a prompt, at most {MAX_TOKENS:,}; its model_max_length is missing or "
                "damaged. Download it again"
            ) from error

    def _load(self, name: str) -> LoadedEncoder:
        part = self._parts[name]
        folder = fetch(self._source, (part.encoder, part.tokenizer))
        for problem in part.problems(folder):
            raise WeightsError(
                f"{self._source} cannot encode a prompt: {problem}; or store the embeddings (and "
                "the negative one) in the data set"
            )
        tokenizer = load_tokenizer(folder / part.tokenizer)
        encoder = load_encoder(load_class(part.model), folder / part.encoder, part.dtype)
        check_vocabulary(tokenizer, encoder, folder / part.tokenizer)
        part.check(encoder, folder / part.encoder)
        return LoadedEncoder(tokenizer, encoder.to(self._device))


def _require_prompts(prompts: Sequence[str]) -> None:
    if not prompts:
        raise ConditioningError("no prompts to encode; give one a sample (it may be empty)")


def without_padding(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Set hidden states [B, L, D] to 0 where the mask [B, L] is; both fp32."""
    # where, not a product: 0 * nan or inf of a masked position would stay nan.
    return torch.where(mask[..., None] > 0, hidden.float(), 0.0), mask.float()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer of transformers, and try it.

    Its JSON is read by our own reader first: transformers' raises from several libraries, and some
    of them stop the process at a file that is nested deeply enough.

    Raises:
        WeightsError: a file is damaged, or the tokenizer cannot pad and cut a text.
    """
    try:
        for file in sorted(folder.glob("*.json")):
            names = read_json_object(file)
            if file.name in _SETTINGS and not all(map(str.isprintable, names)):
                raise UnreadableFileError(f"{file} has an entry whose name is not printable")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer(["a"], padding="max_length", max_length=4, truncation=True)
    except UnreadableFileError as error:
        raise WeightsError(f"{error}. Download {folder} again") from error
    except BaseException as error:
        # tokenizers' Rust code panics at some settings, which is no Exception in Python.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _unreadable(folder, error) from error
    return tokenizer


def count_tokens(folder: Path, captions: Sequence[str], limit: int) -> CaptionTokens:
    """Tokenize captions uncut, and count.

    Raises:
        WeightsError: as ``load_tokenizer``.
    """
    tokenizer = load_tokenizer(folder)
    if not captions:
        return CaptionTokens(counts=(), unknown=(), limit=limit)
    rows = cast(list[list[int]], tokenizer(list(captions), verbose=False)["input_ids"])
    unknown = cast("int | None", tokenizer.unk_token_id)
    return CaptionTokens(
        counts=tuple(map(len, rows)),
        unknown=tuple(0 if unknown is None else row.count(unknown) for row in rows),
        limit=limit,
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, encoder: nn.Module, folder: Path) -> None:
    """Refuse a tokenizer with words that the encoder has no row for: on a GPU the call of one
    would end the process.

    Raises:
        WeightsError: the two are of two models.
    """
    embedding = cast(PreTrainedModel, encoder).get_input_embeddings()
    rows = cast(nn.Embedding, embedding).num_embeddings
    # Marks around a prompt have numbers of their own in tokenizer.json, which no word need have.
    marks = cast(list[int], tokenizer("", truncation=True, max_length=MAX_TOKENS)["input_ids"])
    largest = max([*tokenizer.get_vocab().values(), *marks], default=0)
    if largest >= rows:
        raise WeightsError(
            f"{folder} has words up to number {largest}, and the encoder beside it has {rows} "
            "rows; the two are of different models. Download the folder again"
        )


def _unreadable(folder: Path, error: BaseException) -> WeightsError:
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return WeightsError(
        f"{folder} cannot be read ({type(error).__name__}: {reason:.300}). Download it again"
    )


def load_encoder(model_class: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load an encoder of transformers in eval mode, with every key found.

    Raises:
        WeightsError: unmatched keys, or a damaged file.
    """
    read_config(folder / "config.json")
    what = f"{folder} cannot be read as {model_class.__name__}"
    with _without_progress_bar(), limited_building(what, "download it again"):
        # A .bin file is a pickle, which can run code, and is never read.
        loaded = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        encoder, info = cast(tuple[nn.Module, dict[str, Iterable[Any]]], loaded)
    unmatched = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if unmatched:
        raise WeightsError(f"{folder}: the keys do not match {model_class.__name__}: {unmatched}")
    return encoder.eval().requires_grad_(False)


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
