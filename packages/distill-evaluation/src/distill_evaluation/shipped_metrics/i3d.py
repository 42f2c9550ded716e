"""Features of I3D, as FVD takes them, from its TorchScript file."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import torch
from distill_protocols import Metric, MetricParts, WeightsError
from torch import Tensor, nn
from torch.nn import functional

from distill_evaluation.metrics import feature_statistics
from distill_evaluation.shipped_metrics.configs import FvdConfig
from distill_evaluation.shipped_metrics.frechet import FeatureSpace, FrechetDistances

SIDE = 224
FEWEST_FRAMES = 10
"""I3D halves time four times, and fails on shorter clips."""


def build(config: FvdConfig, parts: MetricParts) -> Metric:
    """Make the metric.

    Raises:
        WeightsError: the file is another than ``config.sha256`` names, or no TorchScript.
    """
    network = load_pinned_program(Path(config.network), config.sha256, parts.device)

    def features(clips: Tensor) -> Tensor:
        with torch.no_grad():
            chunks = [prepare(chunk.to(parts.device)) for chunk in clips.split(config.batch)]
            # As StyleGAN-V calls it: scaled here, 400 numbers a clip.
            return torch.cat([
                network(chunk, rescale=False, resize=False, return_features=True).float().cpu()
                for chunk in chunks
            ])  # fmt: skip

    assert parts.real is not None, "the plugin states that it needs them"
    space = FeatureSpace(
        name="I3D",
        features=lambda samples: features(samples.all_clips),
        reference=feature_statistics(features(parts.real.clips)),
    )
    return FrechetDistances({"fvd": space})


def load_pinned_program(file: Path, sha256: str, device: torch.device) -> nn.Module:
    """Load a TorchScript file, if it is the one that is expected.

    Raises:
        WeightsError: it is another, or no TorchScript.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error}). Name the file of I3D.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise WeightsError(
            f"{file} has SHA-256 {found}, and {sha256} is expected: a TorchScript file is a "
            "program, so that no other is run, and another network's FVD compares with nobody's. "
            "Get the published file, or name the hash of one that you trust (sha256)."
        )
    with warnings.catch_warnings():
        # TorchScript is deprecated, and what FVD is published with.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            # The bytes that were hashed, and not the file, which somebody may have replaced since.
            return torch.jit.load(io.BytesIO(content), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise WeightsError(
                f"{file} is no TorchScript file ({error}). Get the published one."
            ) from error


def prepare(clips: Tensor) -> Tensor:
    """Scale clips [N, 3, F, H, W] in [0, 1] to cover 224 x 224, crop the middle, and map them to
    [-1, 1].

    ValueError for clips that are too short.
    """
    frames, height, width = clips.shape[2:]
    if frames < FEWEST_FRAMES:
        raise ValueError(
            f"clips of {frames} frames: FVD needs at least {FEWEST_FRAMES}, because I3D halves "
            "time again and again; measure distances instead, which take clips of any length"
        )
    scale = SIDE / min(height, width)
    size = (round(height * scale), round(width * scale))
    flat = clips.float().transpose(1, 2).flatten(0, 1)
    flat = functional.interpolate(flat, size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    flat = flat[..., top : top + SIDE, left : left + SIDE]
    return (2 * flat - 1).unflatten(0, (len(clips), frames)).transpose(1, 2).contiguous()
