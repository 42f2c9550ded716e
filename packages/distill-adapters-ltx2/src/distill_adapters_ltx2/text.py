"""Prompts through Gemma 3 and LTX-2's connectors, as ``LTX2Pipeline`` encodes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from distill_diffusers.components.encoders import LoadedEncoder, TextEncoderPart, TextEncoders
from distill_diffusers.fingerprints import module_fingerprint
from distill_diffusers.folders import fetch
from distill_diffusers.kinds import load_class
from distill_diffusers.weights.modules import load_module
from distill_protocols import ConditioningError, WeightsError
from torch import Tensor

from distill_adapters_ltx2.kind import AUDIO_TEXT, CONNECTORS, TEXT, TEXT_MASK

CONNECTOR_CLASS = "diffusers.pipelines.ltx2.connectors:LTX2TextConnectors"
GEMMA = "transformers.models.gemma3.modeling_gemma3:Gemma3ForConditionalGeneration"


class ConnectedEncoders(TextEncoders):
    """Gemma 3, all of whose hidden states two small transformers make one text of for each part.

    Args:
        source: Diffusers folder or hub id.
        dtype: of Gemma's weights; the connectors are in fp32.
        length: tokens of a prompt.
        settings: see ``TextEncoders``.
        device: where they run.
    """

    def __init__(
        self,
        source: str,
        *,
        dtype: torch.dtype,
        length: int,
        settings: Mapping[str, object],
        device: torch.device,
    ) -> None:
        part = TextEncoderPart(model=GEMMA, dtype=dtype)
        super().__init__(source, [part], settings=settings, device=device)
        self._length = length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts one at a time: a row depends on its prompt alone.

        Returns:
            ``text`` [B, L, D], ``audio_text`` [B, L, D'] and ``text_mask`` [B, L], 1 at tokens
            that are attended to; all fp32.

        Raises:
            ConditioningError: no prompts.
            WeightsError: a file is missing or damaged, or a prompt has another length than the
                connectors take.
        """
        if not prompts:
            raise ConditioningError("no prompts to encode; give one a sample (it may be empty)")
        with self.loaded(CONNECTORS) as connectors, self.loaded() as text:
            registers = connectors.encoder.config.video_connector_num_learnable_registers
            if registers and self._length % registers:
                raise WeightsError(
                    f"prompts of {self._length} tokens, and the connectors of {self._source} fill "
                    f"up multiples of {registers}. Use such a max_sequence_length"
                )
            rows = [self._encode_one(text, connectors.encoder, prompt) for prompt in prompts]
        columns = (torch.cat(column).float() for column in zip(*rows, strict=True))
        return dict(zip((TEXT, AUDIO_TEXT, TEXT_MASK), columns, strict=True))

    def _encode_one(self, text: LoadedEncoder, connectors: Any, prompt: str) -> Sequence[Tensor]:
        text.tokenizer.padding_side = "left"  # whatever its file states, as the pipeline has it
        tokens = text.tokenizer(
            [prompt.strip()],
            padding="max_length",
            max_length=self._length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self._device)
        ids, mask = cast(Tensor, tokens["input_ids"]), cast(Tensor, tokens["attention_mask"])
        output = text.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        hidden = torch.stack(output.hidden_states, dim=-1).flatten(2, 3).float()
        return connectors(hidden, mask, padding_side="left")

    def fingerprint(self) -> dict[str, str]:
        """Name what ``TextEncoders`` does, and the connectors; empty where either is not here."""
        own, entries = module_fingerprint(self._source, CONNECTORS), super().fingerprint()
        return {**entries, **own} if own and entries else {}

    def _load(self, name: str) -> LoadedEncoder:
        if name != CONNECTORS:
            return super()._load(name)
        folder = fetch(self._source, (CONNECTORS,)) / CONNECTORS
        module = load_module(
            load_class(CONNECTOR_CLASS), folder, dtype=torch.float32, device=self._device
        )
        return LoadedEncoder(cast(Any, None), module.requires_grad_(False))
