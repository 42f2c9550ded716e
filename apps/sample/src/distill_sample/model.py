"""A role that is loaded and makes clips: whole ones, or a stream of chunks without an end.

Letters: B clips, C channels, T latent frames, H and W latent height and width, F frames.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import evolve, frozen
from distill_checkpoint import StoredCheckpoint, read_start_weights
from distill_conditioning import CachedConditioning, ConditioningConfig
from distill_protocols import (
    Condition,
    ConditioningError,
    ContractError,
    DistillAdapter,
    GivenFrames,
    RowGenerators,
    SamplerSpec,
    WeightSource,
    draw_noise,
    map_latents,
)
from distill_runtime import ALONE, Ranks, device_type
from torch import Tensor

from distill_sample.sources import SampleSource, Weights, read_sample_source


@frozen(eq=False, kw_only=True)
class StreamedChunk:
    """A part of a video that is made while it is shown.

    Attributes:
        frames: [1, 3, F, H_px, W_px] in [0, 1], on the CPU.
        seconds: that its sampling and decoding took.
    """

    frames: Tensor
    seconds: float


@frozen(eq=False, kw_only=True)
class Model:
    """Loaded roles, and what encodes prompts for them. ``open_model`` makes one."""

    source: SampleSource
    adapter: DistillAdapter
    conditioning: CachedConditioning
    device: torch.device

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        role: str | None = None,
        sampler: SamplerSpec | None = None,
        images: Tensor | None = None,
        last_images: Tensor | None = None,
        batch: int = 1,
        first: int = 0,
    ) -> Tensor:
        """Sample one clip a prompt: [B, 3, F, H_px, W_px] in [0, 1], on the CPU.

        Clip n has the noise that a stock pipeline draws after ``torch.manual_seed(seed + n)``, so
        on a CPU both make the same clip.

        Args:
            role: None: the one that was asked for.
            sampler: None: the role's own.
            images: first frames [B, 3, H_px, W_px] in [0, 1], for models that take one; or of each
                clip several that it goes on from, [B, 3, K, H_px, W_px].
            last_images: last frames [B, 3, H_px, W_px], beside first ones.
            batch: clips sampled at once.
            first: number of the first clip, where these are some of many.

        Raises:
            ConditioningError: a model gets frames that it does not read, or not those that it
                cannot do without.
        """
        name, spec = self._choose(role, sampler)
        cond = self._encode(name, prompts, images, last_images)
        clips = []
        for start in range(0, len(prompts), batch):
            rows = list(range(start, min(start + batch, len(prompts))))
            generators = RowGenerators.of_clips(seed, [first + row for row in rows])
            noise = draw_noise(self.adapter, self.adapter.latent_shape, generators)
            latents = self.adapter.sample(
                name,
                spec,
                map_latents(lambda tensor: tensor.to(self.device), noise),
                cond[torch.tensor(rows)],
                neg_cond=self._negative(spec),
                generators=generators,
            )
            clips.append(self.adapter.decode(latents).cpu())
        return torch.cat(clips)

    def stream(
        self,
        prompt: str,
        *,
        frames: int,
        seed: int = 0,
        role: str | None = None,
        sampler: SamplerSpec | None = None,
        image: Tensor | None = None,
    ) -> Iterator[StreamedChunk]:
        """Sample a video of a causal role chunk by chunk, and decode each as it is made.

        A video of the length of the run's clips is that of ``sample``.

        Args:
            frames: latent frames of the whole video, which may be longer than the run's clips.
            image: first frame [3, H_px, W_px], or several, [3, K, H_px, W_px].

        Raises:
            ContractError: the role is not causal.
        """
        name, spec = self._choose(role, sampler)
        causal = self.adapter.causal
        if causal is None or name not in self.adapter.capabilities.causal_roles:
            raise ContractError(
                f"{name!r} is not causal: it makes a clip as a whole, of the length that it was "
                "trained on. Only roles of pipeline_config.causal.roles can be streamed"
            )
        cond = self._encode(name, [prompt], None if image is None else image[None])
        generators = RowGenerators.of_clips(seed, [0])
        channels, _, height, width = self.adapter.latent_shape
        noise = generators.normal((channels, frames, height, width)).to(self.device)
        parts = (noise[:, :, chunk.span] for chunk in causal.chunks(name, frames))
        latents = causal.stream(
            name, spec, parts, cond, neg_cond=self._negative(spec), generators=generators
        )
        began = time.perf_counter()
        for clip in causal.decode_stream(latents):
            made = clip.cpu()  # waits for the device, so that the clock is right
            yield StreamedChunk(frames=made, seconds=time.perf_counter() - began)
            began = time.perf_counter()

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts, and the negative one where a role is guided, all at once."""
        self.conditioning.encode(prompts)
        for role in self.source.roles:
            self._negative(self.spec(role))

    def spec(self, role: str) -> SamplerSpec:
        """How a role is sampled unless a caller says otherwise."""
        return self._choose(role, None)[1]

    def clip_size(self) -> tuple[int, int]:
        """Height and width of clips, in pixels."""
        channels, _, height, width = self.adapter.latent_shape
        frame = torch.zeros(1, channels, 1, height, width, device=self.device)
        size = self.adapter.decode(frame).shape[-2:]
        return size[0], size[1]

    def _choose(self, role: str | None, sampler: SamplerSpec | None) -> tuple[str, SamplerSpec]:
        name = role or self.source.main
        if name not in self.source.roles:
            raise ContractError(
                f"{name!r} was not loaded (loaded: {', '.join(self.source.roles)}). Name it in "
                "open_model's also"
            )
        spec = sampler or self.source.roles[name].sampler
        if spec is None:
            raise ContractError(f"nothing says how {name!r} is sampled. Give a sampler")
        return name, spec

    def _encode(
        self,
        role: str,
        prompts: Sequence[str],
        images: Tensor | None,
        last_images: Tensor | None = None,
    ) -> Condition:
        several = images is not None and images.dim() == 5
        given = GivenFrames(
            first=0 if images is None else images.shape[2] if several else 1,
            last=last_images is not None,
        )
        spec, pipeline = self.source.roles[role].spec, self.source.pipeline
        problem = self.source.family_plugin.frame_conditions(spec, pipeline).problem(given)
        if problem is not None:
            raise ConditioningError(f"role {role!r}: {problem}")
        return self.conditioning.encode(prompts, images, last_images).to(self.device)

    def _negative(self, spec: SamplerSpec) -> Condition | None:
        if not self.adapter.capabilities.reads_negative(*spec.guidances):
            return None
        return self.conditioning.negative().to(self.device)


def open_model(
    path: Path | str,
    *,
    role: str | None = None,
    weights: Weights = "auto",
    also: Sequence[str] = (),
    samplers: Mapping[str, SamplerSpec] | None = None,
    base: Path | str | None = None,
    device: torch.device | str | None = None,
    cache: Path | str | None = None,
) -> Model:
    """Load what ``path`` holds, ready to sample; the arguments are those of ``read_sample_source``.

    Args:
        device: None: the accelerator that is there, or the CPU.
        cache: folder of encoded prompts; None: they are kept in memory alone.

    Raises:
        DistillError: it cannot be sampled, or weights are damaged.
    """
    source = read_sample_source(
        path, role=role, weights=weights, also=also, samplers=samplers, base=base
    )
    return load(source, device=torch.device(device or device_type()), cache=cache)


def load(
    source: SampleSource,
    *,
    device: torch.device,
    cache: Path | str | None = None,
    negative_prompt: str | None = None,
    ranks: Ranks = ALONE,
) -> Model:
    """Load the roles of ``source``; of several ``ranks`` the first alone encodes prompts."""
    family = source.family_plugin
    bundle = family.load(
        [role.spec for role in source.roles.values()],
        source.pipeline,
        device=device,
        weights=_weights(source),
    )
    adapter = family.adapter(bundle, source.pipeline, source=source.components)
    prompt = source.negative_prompt if negative_prompt is None else negative_prompt
    conditioning = CachedConditioning(
        ConditioningConfig(negative_prompt=prompt),
        encoder=adapter,
        output_dir=cache,
        device=device,
        ranks=ranks,
    )
    return Model(source=source, adapter=adapter, conditioning=conditioning, device=device)


def _weights(source: SampleSource) -> dict[str, Mapping[str, WeightSource]]:
    weights: dict[str, Mapping[str, WeightSource]] = {}
    for name, role in source.roles.items():
        if role.weights is not None:
            weights[name] = StoredCheckpoint.open(role.weights).weights(name, ema=role.ema)
        elif (start := role.init_from) is not None:
            weights[name] = read_start_weights(
                start.path,
                start.role or name,
                ema=start.ema,
                family=source.family_plugin,
                spec=evolve(role.spec, lora=None),
            )
    return weights
