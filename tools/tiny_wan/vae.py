"""The tiny video VAE: architecture, training, measured latent statistics.

Architecture is diffusers' `AutoencoderKLWan`, small: a clip `[3, 9, 32, 32]` becomes latents `[8,
3, 4, 4]`. Legend: B C T H W; pixels are in [-1, 1], as Wan's VAE takes them.
"""

import math
import time
from collections.abc import Callable

import attrs
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify
from moving_digits import draw_clips, load_images, to_rgb
from torch.nn import functional

PATCH = 2


@attrs.frozen(kw_only=True)
class VaeTraining:
    """Chosen by measurement; 12 minutes on one CPU thread."""

    steps: int = 3400
    batch: int = 6
    lr: float = 4e-3
    warmup: int = 30
    l1_weight: float = 0.2
    kl_weight: float = 1e-4
    clips: int = 12_000
    seed: int = 0


def build_vae(channels: int = 8) -> AutoencoderKLWan:
    """Make an untrained one, with latents of so many channels.

    `scale_factor_*` are set by hand because `WanPipeline` reads them from the config and cannot
    derive them.
    """
    vae = AutoencoderKLWan(
        base_dim=12,
        z_dim=channels,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=PATCH,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    # The encoder's last convolution emits mean and log variance. Starting at a variance of e^-5
    # keeps the posterior's noise from drowning the signal: without this (and with a larger KL
    # weight) the decoder collapsed to black.
    with torch.no_grad():
        vae.quant_conv.bias[channels:] = -5.0
    return vae


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamp to [-1, 1], which has no gradient where it bites: on this
    data, nearly everywhere.
    """
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), patch_size=PATCH)


def train_on_digits(config: VaeTraining) -> AutoencoderKLWan:
    """Train on the `train` images only, so that the held-out numbers are honest."""
    data = draw_clips(load_images("train"), config.clips, seed=config.seed)
    return train_vae(config, lambda picks: to_rgb(data.grey[picks.numpy()]))


def train_vae(
    config: VaeTraining, read: Callable[[torch.Tensor], torch.Tensor], channels: int = 8
) -> AutoencoderKLWan:
    """Train a VAE on clips.

    Args:
        config: `config.clips` is how many there are.
        read: gives clips `[B, 3, T, H, W]` in [0, 1] by their numbers `[B]`.
        channels: of the latents.
    """
    torch.manual_seed(config.seed)
    vae = build_vae(channels)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / config.warmup, 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
        ),
    )
    started = time.process_time()
    for step in range(config.steps):
        pixels = read(torch.randint(config.clips, (config.batch,))) * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        restored = decode_unclamped(vae, posterior.sample())
        error = restored - pixels
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error.square().mean() + config.l1_weight * error.abs().mean() + config.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == config.steps - 1:
            seconds = time.process_time() - started
            mse = float(error.detach().clamp(-2, 2).square().mean())
            print(
                f"vae step {step} loss {loss.item():.4f} psnr {psnr(mse):.1f} kl {kl.item():.2f} "
                f"cpu {seconds:.0f} s",
                flush=True,
            )
    return vae.eval()


def psnr(mse: float) -> float:
    """Return the PSNR of pixels in [-1, 1], whose peak is 2."""
    return 10 * math.log10(4 / max(mse, 1e-12))


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: torch.Tensor, batch: int = 50) -> torch.Tensor:
    """Posterior means, raw (not normalised): `[N, 3, T, H, W]` in [0, 1] to `[N, 8, 3, 4, 4]`."""
    return torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in clips.split(batch)])


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: torch.Tensor, batch: int = 50) -> torch.Tensor:
    """Decode to pixels in [0, 1], the inverse of `encode`."""
    return torch.cat(
        [vae.decode(part).sample.clamp(-1, 1) / 2 + 0.5 for part in latents.split(batch)]
    )


def record_statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> None:
    """Put each channel's mean and standard deviation into the config: diffusers decodes `z * std +
    mean`.
    """
    vae.register_to_config(
        latents_mean=[round(v, 6) for v in latents.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(v, 6) for v in latents.std((0, 2, 3, 4)).tolist()],
    )


def reconstruction_psnr(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """dB per clip, `[N]`."""
    restored = decode(vae, encode(vae, clips))
    mse = functional.mse_loss(restored, clips, reduction="none").mean((1, 2, 3, 4)) * 4
    return torch.tensor([psnr(float(value)) for value in mse])
