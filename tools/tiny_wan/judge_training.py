"""Train the judge of the moving digits.

The judge sees the `judge` images only: never one that the teacher was trained on, never one of the
reference. B clips, T frames, H, W.
"""

import math

import attrs
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from distill_evaluation import Judge, JudgeConfig
from distill_evaluation.judge import ClipJudge
from moving_digits import (
    CANVAS,
    DIGITS,
    DIRECTIONS,
    FRAMES,
    Clips,
    Images,
    draw_clips,
    load_images,
    to_rgb,
)
from torch import Tensor, nn
from torch.nn import functional
from vae import decode, encode


@attrs.frozen(kw_only=True)
class JudgeTraining:
    """Three minutes on one thread, a third of it for the decoded clips.

    `spoilt`: share of a batch that is spoilt on purpose; `spoilt_weight`: of the loss for telling
    it. Without that third question the features forget whatever naming digits does not need, and
    the distance called samples good in which one digit visibly turned into another.
    """

    steps: int = 2400
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    dropout: float = 0.3
    spoilt: float = 0.375
    spoilt_weight: float = 1.0
    features: int = 32
    copies: int = 12
    clips: int = 20_000
    decoded: int = 3_000
    seed: int = 1


@attrs.frozen
class _Pool:
    """Grey clips `[N, T, H, W]` in bytes, their labels, and for each another of its caption."""

    grey: Tensor
    labels: dict[str, Tensor]
    partner: Tensor

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row numbers `[B]`; clips and their partners `[B, T, H, W]` in [0, 1]."""
        rows = torch.randint(len(self.grey), (count,))
        return rows, self.grey[rows].float() / 255, self.grey[self.partner[rows]].float() / 255


def train_judge(vae: AutoencoderKLWan, config: JudgeTraining) -> Judge:
    """Half of every batch are original clips, half have been through the VAE.

    With originals only, the judge would call the VAE's slight blur alone a problem.
    """
    torch.manual_seed(config.seed)
    pools = _pools(vae, config)
    judge = ClipJudge(
        JudgeConfig(
            attributes={"digit": DIGITS, "direction": DIRECTIONS},
            frames=FRAMES,
            height=CANVAS,
            width=CANVAS,
            features=config.features,
        )
    )
    spoilt_head = nn.Linear(config.features, 1)  # a question for training only: not shipped
    optimizer = torch.optim.AdamW(
        [*judge.parameters(), *spoilt_head.parameters()],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / config.warmup)
            * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        ),
    )
    for step in range(config.steps):
        drawn = [pool.draw(config.batch // 2) for pool in pools]
        clips = torch.cat([clips for _, clips, _ in drawn])
        partners = torch.cat([partners for _, _, partners in drawn])
        spoilt = torch.zeros(config.batch)
        for rows in torch.randperm(config.batch)[: int(config.spoilt * config.batch)].chunk(4):
            clips[rows] = spoil(clips[rows], partners[rows])
            spoilt[rows] = 1
        features = judge.features(clips.unsqueeze(1).expand(-1, 3, -1, -1, -1))
        features = functional.dropout(features, config.dropout)
        answer = spoilt_head(functional.silu(features))[:, 0]
        # 0.05 and 0.95 instead of 0 and 1, as the label smoothing of the other questions.
        loss = config.spoilt_weight * functional.binary_cross_entropy_with_logits(
            answer, 0.05 + 0.9 * spoilt
        )
        for name, logits in judge.logits(features).items():
            truth = torch.cat(
                [pool.labels[name][rows] for pool, (rows, _, _) in zip(pools, drawn, strict=True)]
            )
            loss = loss + functional.cross_entropy(
                logits, truth, label_smoothing=config.label_smoothing
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == config.steps - 1:
            print(f"judge step {step} loss {loss.item():.3f}", flush=True)
    return Judge(judge.eval().requires_grad_(False))


def spoil(clips: Tensor, partners: Tensor) -> Tensor:
    """Spoil clips `[B, T, H, W]` by one of four defects that video models have.

    `partners` are other clips of the same captions.
    """
    ones = torch.ones(len(clips), 1, 1, 1)
    kind = int(torch.randint(4, ()))
    if kind == 0:  # blurred
        radius = int(torch.randint(1, 3, ()))
        blurred = functional.avg_pool2d(clips, 2 * radius + 1, 1, radius)
        return functional.avg_pool2d(blurred, 3, 1, 1)
    if kind == 1:  # two answers at once
        share = 0.3 + 0.4 * torch.rand_like(ones)
        return share * clips + (1 - share) * partners
    if kind == 2:  # one answer turns into another
        time = torch.linspace(0, 1, clips.shape[1]).view(1, -1, 1, 1)
        share = torch.sigmoid((time - 0.2 - 0.6 * torch.rand_like(ones)) * 12)
        return (1 - share) * clips + share * partners
    coarse = functional.avg_pool2d(clips, 4)  # details lost
    return functional.interpolate(coarse, scale_factor=4, mode="bilinear")


def _pools(vae: AutoencoderKLWan, config: JudgeTraining) -> tuple[_Pool, _Pool]:
    """Original clips, and others that were sent through the VAE."""
    images = augment(load_images("judge"), config.copies, config.seed)
    originals = draw_clips(images, config.clips, seed=config.seed)
    source = draw_clips(images, config.decoded, seed=config.seed + 1)
    restored = decode(vae, encode(vae, to_rgb(source.grey)))
    grey = restored.mean(1).mul(255).round().byte()
    return _pool(originals, torch.from_numpy(originals.grey)), _pool(source, grey)


def _pool(clips: Clips, grey: Tensor) -> _Pool:
    caption = clips.digit * len(DIRECTIONS) + clips.direction
    rng = np.random.default_rng(0)
    partner = np.arange(len(caption))
    for number in np.unique(caption):
        members = np.flatnonzero(caption == number)
        partner[members] = rng.permutation(members)
    labels = {name: torch.from_numpy(getattr(clips, name)) for name in ("digit", "direction")}
    return _Pool(grey, labels, torch.from_numpy(partner))


def augment(images: Images, copies: int, seed: int) -> Images:
    """Return the images and `copies` turned, scaled and sheared ones; 1,200 are few to train on."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.from_numpy(images.pixels).float().unsqueeze(1)
    variants = [pixels]
    for _ in range(copies):
        wobble = (torch.rand(len(pixels), 2, 2, generator=generator) - 0.5) * 0.4
        matrix = functional.pad(torch.eye(2) + wobble, (0, 1))
        grid = functional.affine_grid(matrix, list(pixels.shape), align_corners=False)
        variants.append(functional.grid_sample(pixels, grid, align_corners=False))
    together = torch.cat(variants)[:, 0].round().clamp(0, 255).byte().numpy()
    return Images(together, np.tile(images.labels, copies + 1))
