"""A judge: a small network that classifies decoded clips, and whose features the Frechet distance
is measured on.

A judge is a folder: `judge.json` (JudgeConfig) and `judge.safetensors` (weights). Clips are `[B, 3,
T, H, W]` in [0, 1].
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import torch
from distill_protocols import WeightsError
from distill_runtime import (
    UnreadableFileError,
    as_count,
    json_text,
    read_json_object,
    replace_file,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_evaluation.judge_files import SETTINGS, WEIGHTS
from distill_evaluation.labels import label_prompts, read_words

MAX_SIZE = 1 << 16
"""Frames, pixels and channels."""


def _attributes(raw: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    return {name: read_words(name, classes) for name, classes in raw.items()}


def _check_grey(_config: object, attribute: "attrs.Attribute[bool]", value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{attribute.name}: {value!a:.80} must be true or false")


def _check_size(_config: object, attribute: "attrs.Attribute[int]", value: int) -> None:
    as_count(value, least=1, most=MAX_SIZE)


@attrs.frozen(kw_only=True)
class JudgeConfig:
    """The clips that a judge takes, and the answers it can give.

    `attributes`: attribute name to class words, in the order of the head's outputs. `frames`,
    `height`, `width`: the only clip size it accepts. `width_factor`: channels of the first
    convolution. `features`: D. `grey`: it averages the colours of a pixel, so that neither its
    answers nor its features tell a faded or over-saturated clip; a folder that says nothing is of
    such a judge.
    """

    attributes: dict[str, tuple[str, ...]] = attrs.field(converter=_attributes)
    frames: int = attrs.field(validator=_check_size)
    height: int = attrs.field(validator=_check_size)
    width: int = attrs.field(validator=_check_size)
    width_factor: int = attrs.field(default=24, validator=_check_size)
    features: int = attrs.field(default=64, validator=_check_size)
    grey: bool = attrs.field(default=True, validator=_check_grey)


class ClipJudge(nn.Module):
    """Convolutions over the clip's frames as channels (and its colours, if it is not grey), one
    linear layer of features, one linear head per attribute.

    Frames as channels let a plain image network see motion. The features keep position (they are
    not pooled to a point), so that clips which all start at the same place differ from clips that
    do not.
    """

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        first = config.width_factor
        channels = config.frames * (1 if config.grey else 3)
        sizes = (channels, first, 2 * first, 4 * first, 4 * first)
        layers: list[nn.Module] = []
        for index, (inner, outer) in enumerate(pairwise(sizes)):
            stride = 1 if index == len(sizes) - 2 else 2
            layers += [
                nn.Conv2d(inner, outer, 3, stride=stride, padding=1),
                nn.GroupNorm(4, outer),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        cells = -(-config.height // 8) * -(-config.width // 8)
        self.embed = nn.Linear(sizes[-1] * cells, config.features)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(config.features, len(words))
                for name, words in config.attributes.items()
            }
        )

    def features(self, clips: Tensor) -> Tensor:
        """Compute features `[B, D]` of clips `[B, 3, T, H, W]` in [0, 1].

        ValueError for another size.
        """
        config = self.config
        expected = (3, config.frames, config.height, config.width)
        if clips.ndim != 5 or tuple(clips.shape[1:]) != expected:
            raise ValueError(
                f"clips of shape {tuple(clips.shape)}: this judge takes [B, "
                f"{', '.join(map(str, expected))}], because it was trained on "
                "that size; sample clips of that size, or use a judge made for yours."
            )
        clips = clips.float()
        seen = clips.mean(1) if config.grey else clips.flatten(1, 2)
        return self.embed(self.trunk(seen * 2 - 1).flatten(1))

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Compute logits per attribute, `[B, classes]`."""
        return self.logits(self.features(clips))

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """Compute logits per attribute from features `[B, D]`."""
        active = nn.functional.silu(features)
        return {name: head(active) for name, head in self.heads.items()}


@attrs.frozen
class Judge:
    """A trained ClipJudge. It computes without gradients, in batches, where its weights are."""

    network: ClipJudge
    batch: int = 100

    @classmethod
    def load(cls, folder: Path | str) -> "Judge":
        """Read a judge from a folder. WeightsError if a file is missing or two do not fit."""
        folder = Path(folder)
        for name in (SETTINGS, WEIGHTS):
            if not (folder / name).is_file():
                raise WeightsError(
                    f"{folder}: {name} is missing; a judge's folder holds {SETTINGS} and "
                    f"{WEIGHTS}. "
                    "Give the folder of a judge; `uv run tools/tiny_wan --steps judge` builds the "
                    "tiny one."
                )
        try:
            values: dict[str, Any] = read_json_object(folder / SETTINGS)
            config = JudgeConfig(**values)
            weights = load_file(folder / WEIGHTS)
            with torch.device("meta"):  # what the settings say may be more than memory holds
                shapes = {n: v.shape for n, v in ClipJudge(config).state_dict().items()}
            if shapes != {name: value.shape for name, value in weights.items()}:
                raise ValueError("the weights have other names or shapes")
            network = ClipJudge(config)
            network.load_state_dict(weights)
        except (
            UnreadableFileError, AttributeError, KeyError, OSError, RuntimeError, SafetensorError,
            TypeError, ValueError,
        ) as error:  # fmt: skip
            raise WeightsError(
                f"{folder}: {SETTINGS} and {WEIGHTS} do not describe one judge ({error}); "
                "rebuild the folder rather than mend one of the two."
            ) from error
        return cls(network.eval().requires_grad_(False))

    def save(self, folder: Path | str) -> None:
        """Write `judge.json` and `judge.safetensors`, each whole or not at all."""
        folder = Path(folder)
        with replace_file(folder / WEIGHTS) as path:
            save_file(
                {name: value.contiguous() for name, value in self.network.state_dict().items()},
                path,
            )
        with replace_file(folder / SETTINGS) as path:
            path.write_text(json_text(attrs.asdict(self.network.config)))

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        return self.network.config.attributes

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """Compute features `[B, D]` (fp32, on the CPU) of clips `[B, 3, T, H, W]` in [0, 1].

        ValueError for another size.
        """
        device = next(self.network.parameters()).device
        return torch.cat(
            [self.network.features(part.to(device)).cpu() for part in clips.split(self.batch)]
        )

    @torch.no_grad()
    def classify(self, clips: Tensor) -> dict[str, Tensor]:
        """Find the most likely class index per attribute, `[B]` each, on the CPU.

        ValueError for another size.
        """
        return self.classify_features(self.features(clips))

    @torch.no_grad()
    def classify_features(self, features: Tensor) -> dict[str, Tensor]:
        """Classify clips by features that are computed already."""
        device = next(self.network.parameters()).device
        return {
            name: logits.argmax(1).cpu()
            for name, logits in self.network.logits(features.to(device)).items()
        }

    def expected(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return the class indices that the prompts ask for, `[B]` per attribute.

        PromptLabelError if a prompt names none or two.
        """
        return {
            name: torch.tensor(labels)
            for name, labels in label_prompts(prompts, self.attributes).items()
        }
