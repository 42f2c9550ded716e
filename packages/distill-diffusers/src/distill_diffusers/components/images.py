"""An encoder of pictures and its image processor, through which models read given frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from distill_protocols import WeightsError
from torch import Tensor

from distill_diffusers.components.encoders import load_encoder
from distill_diffusers.folders import IMAGE_PROCESSORS, fetch, image_problems, image_processor_file
from distill_diffusers.model_configs import read_config

MAX_EDGE = 8192
"""Pixels of a picture that an encoder reads."""


@frozen(kw_only=True)
class ImageEncoderKind:
    """Which classes of transformers read a picture, and which hidden state is kept.

    Attributes:
        model: name of the vision model's class.
        processor: name of the image processor's class.
        layer: which of its hidden states, as an index of their list; None: the last, after the
            model's own norm.
    """

    model: str
    processor: str
    layer: int | None


CLIP = ImageEncoderKind(model="CLIPVisionModel", processor="CLIPImageProcessor", layer=-2)
"""As Wan 2.1 image-to-video reads a first frame."""
SIGLIP = ImageEncoderKind(model="SiglipVisionModel", processor="SiglipImageProcessor", layer=None)
"""As HunyuanVideo 1.5 image-to-video reads a first frame."""


class ImageEncoder:
    """A vision model: pictures to embeddings. In memory only while it encodes.

    Args:
        source: Diffusers folder or hub id.
        kind: its classes.
        device: where the encoder runs, in fp32.
    """

    def __init__(self, source: str, kind: ImageEncoderKind = CLIP, *, device: torch.device) -> None:
        self._source = source
        self._kind = kind
        self._device = device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W] in [0, 1], or several a row [B, N, 3, H, W].

        Returns:
            hidden states [B, N L, D], those of a row's pictures after each other.

        As the pipelines encode the same pictures in 8 bits, which frames of a video are. One row at
        a time, as they do.
        """
        processor, encoder = self._load()
        several = images if images.dim() == 5 else images.unsqueeze(1)
        rows = []
        for row in (several.clamp(0, 1) * 255).round().to("cpu", torch.uint8):
            pixels = processor(images=list(row), return_tensors="pt").to(self._device)
            output = encoder(**pixels, output_hidden_states=True)
            layer = self._kind.layer
            hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
            rows.append(hidden.flatten(0, 1))
        return torch.stack(rows)

    def _load(self) -> tuple[Any, Any]:
        # On first use: without torchvision, transformers 5 prints a warning when it is imported.
        import transformers

        # By the library's own lookup: which class a processor's name is depends on torchvision.
        model_class = getattr(transformers, self._kind.model)
        processor_class = getattr(transformers, self._kind.processor)
        folder = fetch(self._source, ("image_encoder", *IMAGE_PROCESSORS))
        for problem in image_problems(folder):
            raise WeightsError(
                f"{self._source} cannot encode a picture: {problem}; or store image_embeds in the "
                "data set"
            )
        encoder: Any = load_encoder(model_class, Path(folder) / "image_encoder", torch.float32)
        file = image_processor_file(folder)
        settings = read_config(file)
        try:
            _check_sizes(settings)
            # From its settings alone: a processor's folder may name code of its own.
            processor: Any = processor_class.from_dict(settings)
            oblong = torch.zeros(3, 32, 48, dtype=torch.uint8)  # a square needs no crop
            trial = processor(images=oblong, return_tensors="pt")
            made, side = tuple(trial["pixel_values"].shape), encoder.config.image_size
            if made != (1, 3, side, side):
                raise ValueError(f"it makes pictures {made}, and the encoder reads {side} x {side}")
        except Exception as error:  # whatever its arithmetic raises of wrong settings
            raise WeightsError(
                f"{file} describes no image processor of the encoder beside it "
                f"({type(error).__name__}: {error!s:.200}). Download it again"
            ) from error
        return processor, encoder.to(self._device)


def _check_sizes(settings: Mapping[str, Any]) -> None:
    """Refuse pictures that no memory holds, and a filter that the library would leave out.

    Raises:
        ValueError: an edge is no number from 1 to ``MAX_EDGE``, or the filter is none.
    """
    resample = settings.get("resample")
    if resample is not None and (type(resample) is not int or not 0 <= resample <= 5):
        raise ValueError(f"resample {resample!a:.80} is no filter of Pillow, 0 to 5")
    for name in ("size", "crop_size"):
        value = settings.get(name)
        edges = value.values() if isinstance(value, dict) else value
        for edge in edges if isinstance(edges, Iterable) else [edges]:
            if edge is not None and (type(edge) is not int or not 1 <= edge <= MAX_EDGE):
                raise ValueError(f"{name} {edge!a:.80} is no number from 1 to {MAX_EDGE}")
