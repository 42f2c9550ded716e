"""The five steps, each from files to files. `out` is the folder that becomes `configs/tiny`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_conditioning import ShardWriter
from distill_evaluation import (
    Judge,
    attribute_accuracy,
    feature_statistics,
    frechet_distance,
    within_group_variance,
)
from distill_protocols import Condition, Fingerprint
from distill_runtime import replace_file
from folders import replacing_folder
from judge_training import JudgeTraining, train_judge
from moving_digits import DIRECTIONS, Clips, all_captions, draw_clips, load_images, to_rgb
from pipeline import load_text_side, save_model, save_text_side
from safetensors.torch import save_file
from text import embed
from torch import Tensor
from torch.nn.functional import avg_pool3d
from transformer import build_transformer
from vae import (
    VaeTraining,
    decode,
    encode,
    reconstruction_psnr,
    record_statistics,
    train_on_digits,
)

PIPELINE = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8}
TRAIN_CLIPS, TRAIN_SEED = 12_000, 3
REFERENCE_CLIPS, REFERENCE_SEED = 2_000, 5
CHECK_CLIPS, CHECK_SEED = 400, 99
"""Another draw from the held-out images: what a perfect model would score."""


def build_vae(out: Path) -> None:
    vae = train_on_digits(VaeTraining())
    save_model(vae, out / "wan" / "vae")
    clips = to_rgb(draw_clips(load_images("reference"), CHECK_CLIPS, CHECK_SEED).grey)
    held_out = reconstruction_psnr(vae, clips)
    print(f"vae: held-out PSNR {held_out.mean():.1f} dB, worst {held_out.min():.1f} dB")


def build_text(out: Path) -> None:
    save_text_side(out / "wan", seed=0)
    if not (out / "wan" / "transformer").exists():
        save_model(build_transformer(seed=0), out / "wan" / "transformer")


def build_data(out: Path) -> None:
    vae = load_vae(out)
    clips = draw_clips(load_images("train"), TRAIN_CLIPS, TRAIN_SEED)
    # In parts, because all clips as float RGB at once would be 1.3 GB.
    parts = [encode(vae, to_rgb(clips.grey[i : i + 500])) for i in range(0, TRAIN_CLIPS, 500)]
    latents = torch.cat(parts)
    record_statistics(vae, latents)
    save_config(vae, out / "wan" / "vae")
    embeddings = embed(*load_text_side(out / "wan"), [*all_captions(), ""])
    captions = clips.captions()
    row = {caption: index for index, caption in enumerate(all_captions())}
    with replacing_folder(out / "data") as staging:
        with ShardWriter(
            staging, fingerprint=fingerprint_of(out, WanPipelineConfig(**PIPELINE))
        ) as writer:
            writer.set_negative("", Condition({"text": embeddings[-1:]}))
            ids = [f"digit-{number:05d}" for number in range(TRAIN_CLIPS)]
            text = embeddings[torch.tensor([row[caption] for caption in captions])]
            writer.add(ids, captions, latents, Condition({"text": text}))
        for path in staging.iterdir():
            path.chmod(0o644)
    print(f"data: {TRAIN_CLIPS} latents of {tuple(latents.shape[1:])}")


def save_config(vae: AutoencoderKLWan, folder: Path) -> None:
    vae.save_config(folder)
    # diffusers notes the folder that it read from: a path of this machine, in a file that ships.
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("_name_or_path", None)
    with replace_file(file) as path:
        path.write_text(json.dumps(config, indent=2) + "\n")


def fingerprint_of(out: Path, config: WanPipelineConfig) -> Fingerprint:
    """Return what computes the data set: a run refuses one of other parts than its own."""
    return PLUGIN.fingerprint(config, source=str((out / "wan").resolve()))


def build_judge(out: Path) -> None:
    vae = load_vae(out)
    judge = train_judge(vae, JudgeTraining())
    judge.save(out / "judge")
    reference = to_rgb(draw_clips(load_images("reference"), REFERENCE_CLIPS, REFERENCE_SEED).grey)
    # Through the VAE, since no denoiser can draw sharper than its decoder: the distance is then
    # about the denoiser alone, which is all that distillation changes.
    features = judge.features(decode(vae, encode(vae, reference)))
    with replace_file(out / "judge" / "reference.safetensors") as path:
        save_file({"features": features}, path)
    with replace_file(out / "judge" / "prompts.txt") as path:
        path.write_text("\n".join(all_captions()) + "\n")
    for path in (out / "judge").iterdir():
        path.chmod(0o644)
    check = draw_clips(load_images("reference"), CHECK_CLIPS, CHECK_SEED)
    real = to_rgb(check.grey)
    decoded = decode(vae, encode(vae, real))
    blurred = avg_pool3d(decoded, (1, 3, 3), 1, (0, 1, 1))
    for name, clips in {"real": real, "decoded": decoded, "decoded, blurred": blurred}.items():
        print(f"judge on {name}: {_report(judge, clips, check, features)}")


def _report(judge: Judge, clips: Tensor, truth: Clips, reference: Tensor) -> str:
    features = judge.features(clips)
    distance = frechet_distance(feature_statistics(features), feature_statistics(reference))
    answers = judge.classify_features(features)
    digit = attribute_accuracy(answers["digit"], torch.from_numpy(truth.digit))
    direction = attribute_accuracy(answers["direction"], torch.from_numpy(truth.direction))
    caption = torch.from_numpy(truth.digit * len(DIRECTIONS) + truth.direction)
    variance = within_group_variance(features, caption)
    return (
        f"FD {distance:.2f} digit {digit:.3f} direction {direction:.3f} "
        f"variance within a caption {variance:.3f}"
    )


def build_teacher(out: Path, channels: int = 8) -> None:
    """Train the teacher by the `finetune.yaml` beside the folder that it trains."""
    config = out / "finetune.yaml"
    if not config.is_file():
        raise SystemExit(
            f"{config} is missing: the teacher is trained by the project's finetune method, and "
            "that file describes how. Copy it from configs/tiny/ into the folder that you build."
        )
    settings = yaml.safe_load(config.read_text())
    run = (out / settings["training"]["output_dir"]).resolve()
    if run.exists():
        raise SystemExit(
            f"{run} exists: a run resumes there, and the teacher would be an older build's, or "
            "half of one. Move the folder away, then build the teacher again."
        )
    save_model(build_transformer(seed=0, channels=channels), out / "wan" / "transformer")
    app = Path(__file__).resolve().parents[2] / "apps" / "train"
    subprocess.run([sys.executable, str(app), "--config", str(config)], check=True)
    exported = run / settings["checkpoint"]["export"][0]["folder"] / "transformer"
    with replacing_folder(out / "wan" / "transformer") as staging:
        shutil.copytree(exported, staging, dirs_exist_ok=True)
    print(f"teacher: copied from {exported}")


def load_vae(out: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(out / "wan" / "vae").eval().requires_grad_(False)
