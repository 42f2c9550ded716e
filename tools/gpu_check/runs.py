"""Random models, random data, and run files that the checks train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from attrs import field, frozen
from distill_conditioning import ShardWriter
from distill_protocols import Callback, Condition, RunState, StepRecord
from distill_runfile import RunConfig, read_config
from distill_runtime import device_type
from distill_train.build import Run, build
from distill_trainer import Distribution

ROOT = Path(__file__).resolve().parents[2]
TINY_WAN = ROOT / "configs" / "tiny" / "wan"


@frozen(kw_only=True)
class Size:
    """How large models and clips are.

    Attributes:
        transformer: what differs from the tiny Wan's configuration.
        vae: likewise; None: the tiny one with its weights.
        shape: of a clip's latents.
        text: [L, D] of a caption.
        steps: iterations of a run; every third updates the student.
    """

    name: str
    transformer: dict[str, Any] = field(factory=dict)
    vae: dict[str, Any] | None = None
    num_frames: int
    height: int
    width: int
    shape: tuple[int, int, int, int]
    text: tuple[int, int]
    steps: int

    @property
    def tokens(self) -> int:
        """Of a clip."""
        _, frames, height, width = self.shape
        return frames * (height // 2) * (width // 2)

    def describe(self) -> str:
        """Say it in words."""
        return f"{self.name}: {self.num_frames} frames of {self.height} x {self.width}"


# Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json; its VAE is the class's default.
FULL = Size(
    name="random weights of Wan 2.1 1.3B",
    transformer={
        "num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960,
        "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
        "rope_max_seq_len": 1024,
    },
    vae={},
    num_frames=81, height=480, width=832,
    shape=(16, 21, 60, 104), text=(512, 4096), steps=6,
)  # fmt: skip
TINY = Size(
    name="the tiny Wan",
    num_frames=9, height=32, width=32,
    shape=(8, 3, 4, 4), text=(8, 64), steps=6,
)  # fmt: skip


def prepare(folder: Path, size: Size) -> None:
    """Write a model folder ``wan`` and a data set ``data`` of random numbers."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    device = device_type()
    wan = folder / "wan"
    shutil.copytree(TINY_WAN, wan, ignore=shutil.ignore_patterns("transformer"))
    numbers = json.loads((TINY_WAN / "transformer/config.json").read_text()) | size.transformer
    torch.manual_seed(0)
    with torch.device(device):
        WanTransformer3DModel.from_config(numbers).save_pretrained(wan / "transformer")
        if size.vae is not None:
            shutil.rmtree(wan / "vae")
            AutoencoderKLWan(**size.vae).save_pretrained(wan / "vae")
    if size.text[1] != json.loads((TINY_WAN / "text_encoder/config.json").read_text())["d_model"]:
        # Captions are stored: of the text encoder nothing but its width is used.
        config = UMT5Config.from_pretrained(wan / "text_encoder", d_model=size.text[1])
        shutil.rmtree(wan / "text_encoder")
        UMT5EncoderModel(config).save_pretrained(wan / "text_encoder")
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder / "data", fingerprint={}) as writer:
        negative = torch.randn(1, *size.text, generator=generator)
        writer.set_negative("", Condition({"text": negative}))
        for number in range(4):
            latents = torch.randn(1, *size.shape, generator=generator)
            text = Condition({"text": torch.randn(1, *size.text, generator=generator)})
            writer.add([f"clip-{number}"], [f"clip {number}"], latents, text)


def run_values(folder: Path, size: Size, method: str = "dmd2") -> dict[str, Any]:
    """Return a run file of dmd2 or self_forcing, in bf16 with checkpointed activations."""
    role = {"path": str(folder / "wan"), "precision": "bf16"}
    trained = {**role, "activation_checkpointing": True}
    values: dict[str, Any] = {
        "recipe": {"family": "wan", "method": method},
        "models": {"student": dict(trained), "teacher": dict(role), "critic": dict(trained)},
        "training": {
            "output_dir": str(folder / "out"),
            "max_train_steps": size.steps,
            "global_batch_size": 1,
            "log_every": size.steps,
            "progress": False,
            "optimizer": {"lr": 1.0e-6, "betas": [0.0, 0.999]},
        },
        "data": {"path": str(folder / "data")},
        "conditioning": {"negative_prompt": ""},
        "pipeline_config": {
            "num_frames": size.num_frames,
            "height": size.height,
            "width": size.width,
            "max_sequence_length": size.text[0],
        },
        "method_config": {
            "critic_update": "every_step",
            "generator_update_interval": 3,
            "student_sampler": {"steps": 4, "shift": 5.0, "stochastic": True},
        },
        "checkpoint": {"resume": "none", "save_at_end": False},
        "callbacks": {"grad_clip": {"max_norm": 1.0}, "health": None, "page": None},
    }
    if method == "self_forcing":
        values["pipeline_config"]["causal"] = {"roles": ["student"], "chunk_frames": 3}
    return values


def write_run(folder: Path, name: str, values: dict[str, Any]) -> Path:
    """Write a run file with an output folder of its own."""
    values["training"]["output_dir"] = str(folder / f"out-{name}")
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@contextmanager
def built(file: Path) -> Iterator[tuple[RunConfig, Run]]:
    """Enter with the run of a file, built as the app builds it."""
    config = read_config(file)
    with Distribution.start(config.training.distributed, device_type()) as distribution:
        yield config, build(config, distribution=distribution)


@frozen(eq=False)
class Watch(Callback):
    """Calls functions at the beginning and the end of each iteration."""

    begin: Callable[[int], None]
    end: Callable[[StepRecord], None]
    name: str = "gpu_check"

    def on_step_start(self, run: RunState) -> None:
        self.begin(run.iteration)

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        self.end(step)


def train_watched(
    file: Path,
    begin: Callable[[int], None] = lambda _: None,
    end: Callable[[StepRecord], None] = lambda _: None,
) -> None:
    """Train a run file to its end, watched."""
    with built(file) as (_, run):
        run.trainer.callbacks["gpu_check"] = Watch(begin, end)
        run.trainer.run(run.method, run.loader)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
