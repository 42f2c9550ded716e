"""A tiny model of own clips: the same steps as for the digits, but for the judge.

`out` gets what configs/tiny has: `wan/`, `data/`, `finetune.yaml` and `dmd2.yaml`.
"""

from pathlib import Path
from typing import Any

import attrs
import build
import torch
import yaml
from distill_adapters_wan import WanPipelineConfig
from distill_conditioning import ShardWriter
from distill_protocols import Condition
from folders import replacing_folder
from own_clips import CaptionedClips, OwnClips, read_own_clips
from pipeline import load_text_side, save_model, save_text_side
from safetensors.torch import save_file
from text import embed, language_of
from transformer import build_transformer
from vae import VaeTraining, encode, reconstruction_psnr, record_statistics, train_vae

STEPS = ("vae", "text", "data", "teacher")
SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "tiny"
SHEET_PROMPTS = 5
ENOUGH_FOR_DISTANCES = 96
"""Distances to real clips take 64 components of latents, and as many clips as an entry has are kept
out."""


@attrs.frozen(kw_only=True)
class OwnBuild:
    """What is built of own clips.

    Attributes:
        clips: which, and how they are cut.
        channels: of the latents; more keep more of the picture, and are harder to learn.
        words: of the captions, the most frequent ones, that the tokenizer knows.
        vae_steps, teacher_steps: updates.
    """

    clips: OwnClips
    channels: int
    words: int
    vae_steps: int
    teacher_steps: int

    def run(self, steps: list[str], out: Path) -> None:
        """Run the steps in their order, from files to files."""
        clips = read_own_clips(self.clips)
        print(f"{len(clips.frames)} clips, {len(clips.distinct_captions)} captions")
        actions = {
            "vae": lambda: self._build_vae(clips, out),
            "text": lambda: self._build_text(clips, out),
            "data": lambda: self._build_data(clips, out),
            "teacher": lambda: build.build_teacher(out, self.channels),
        }
        for step in STEPS:
            if step in steps:
                print(f"== {step}", flush=True)
                actions[step]()

    def _build_vae(self, clips: CaptionedClips, out: Path) -> None:
        numbers = clips.trained
        training = VaeTraining(steps=self.vae_steps, clips=len(numbers))
        vae = train_vae(training, lambda picks: clips.read(numbers[picks]), self.channels)
        save_model(vae, out / "wan" / "vae")
        psnr = reconstruction_psnr(vae, clips.read(clips.held_out))
        print(f"vae: held-out PSNR {psnr.mean():.1f} dB, worst {psnr.min():.1f} dB")

    def _build_text(self, clips: CaptionedClips, out: Path) -> None:
        language = language_of(clips.distinct_captions, self.words)
        save_text_side(out / "wan", seed=0, language=language)
        # A raw transformer, so that the folder is a whole pipeline before there is a teacher.
        save_model(build_transformer(seed=0, channels=self.channels), out / "wan" / "transformer")
        print(f"text: {len(language.words)} words, {language.length} tokens a caption")
        for name, values in self._run_files(clips, language.length).items():
            (out / name).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def _build_data(self, clips: CaptionedClips, out: Path) -> None:
        vae = build.load_vae(out)
        every = torch.arange(len(clips.frames))
        latents = torch.cat([encode(vae, clips.read(part)) for part in every.split(50)])
        # Before anything is trained on them: the teacher sees latents of mean 0 and deviation 1.
        record_statistics(vae, latents)
        build.save_config(vae, out / "wan" / "vae")
        tokenizer, encoder = load_text_side(out / "wan")
        captions = clips.distinct_captions
        rows = torch.tensor([captions.index(caption) for caption in clips.captions])
        texts = embed(tokenizer, encoder, [*captions, ""])
        config = WanPipelineConfig(**self._pipeline(tokenizer.model_max_length))
        with (
            replacing_folder(out / "data") as staging,
            ShardWriter(staging, fingerprint=build.fingerprint_of(out, config)) as writer,
        ):
            writer.set_negative("", Condition({"text": texts[-1:]}))
            ids = [f"clip-{number:05d}" for number in every.tolist()]
            writer.add(ids, clips.captions, latents, Condition({"text": texts[rows]}))
        if len(latents) >= ENOUGH_FOR_DISTANCES:
            save_file({"latents": latents}, out / "real.safetensors")
        print(f"data: {len(latents)} latents of {tuple(latents.shape[1:])}")

    def _pipeline(self, length: int) -> dict[str, Any]:
        shape = self.clips.shape
        return {
            "num_frames": shape.frames, "height": shape.height, "width": shape.width,
            "max_sequence_length": length,
        }  # fmt: skip

    def _run_files(self, clips: CaptionedClips, length: int) -> dict[str, dict[str, Any]]:
        """Write the shipped run files for these clips: the teacher's, and one that distils it."""
        files = {}
        for name in ("finetune", "dmd2"):
            values = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
            values["training"]["output_dir"] = f"./runs/{name}"
            values["training"]["global_batch_size"] = min(64, len(clips.frames))
            values["pipeline_config"] = self._pipeline(length)
            files[f"{name}.yaml"] = values
        files["finetune.yaml"]["training"]["max_train_steps"] = self.teacher_steps
        prompts = clips.distinct_captions[:SHEET_PROMPTS]
        files["dmd2.yaml"]["validation"]["prompts"] = prompts[:2]
        report = files["dmd2.yaml"]["callbacks"]["report"]
        for key in ("judge", "prompts"):
            del report[key]
        report |= {"sheet_prompts": prompts, "clips_per_prompt": 4, "reference": "teacher_32"}
        if len(clips.frames) >= ENOUGH_FOR_DISTANCES:
            report["real_latents"] = "./real.safetensors"
        return files
