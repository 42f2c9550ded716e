"""The adapter of a family whose plugin describes how its models are called.

``DiffusersFamily`` knows the shapes of latents and conditions, what does not fit, and one call of
the transformer. An adapter on this class adds what only a loaded run needs: how prompts are
encoded (``encode_condition``), the statistics of the latents, and whatever its pipeline does
otherwise (see ``FlowMatchingAdapter``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from distill_protocols import (
    Condition,
    ConditioningError,
    DataError,
    FrameConditions,
    GivenFrames,
    ModelBundle,
    RoleHandle,
    WeightsError,
)
from torch import Tensor

from distill_diffusers.adapter import FlowMatchingAdapter, VelocityCall, device_of
from distill_diffusers.architecture import patch_size
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.calls.features import FeatureLayout
from distill_diffusers.calls.given_frames import GivenPixels
from distill_diffusers.components.codec import VideoCodec
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.family import DiffusersConfig, DiffusersFamily
from distill_diffusers.folders import fetch
from distill_diffusers.model_configs import read_config

ConfigT = TypeVar("ConfigT", bound=DiffusersConfig)


class FamilyAdapter(FlowMatchingAdapter):
    """``DistillAdapter`` whose calls are its family's ``call_model``.

    Args:
        bundle: the run's roles.
        family: its plugin.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE and encoders.
        statistics: of raw latents.
        encoders: see ``FlowMatchingAdapter``.
        codec: the VAE; None: a ``codec_class`` of ``source``.

    Raises:
        WeightsError: ``source`` has no VAE configuration; clip, VAE and the transformer of a role
            do not fit; the roles read different conditions; or there is no transformer in
            ``source``, and none in the bundle.
    """

    blocks: ClassVar[str] = "transformer_blocks"
    """The module list whose entries give hidden states."""
    block_output: ClassVar[int | None] = None
    """See ``FeatureLayout.output``."""
    codec_class: ClassVar[type[VideoCodec]] = VideoCodec
    """Calls the VAE, where the constructor is given none."""

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[ConfigT],
        config: ConfigT,
        *,
        source: str,
        statistics: LatentStatistics,
        encoders: TextEncoders | None,
        codec: VideoCodec | None = None,
    ) -> None:
        info = family.latent_info(read_config(fetch(source, ("vae",)) / "vae" / "config.json"))
        self.models = {
            name: role for name, role in bundle.roles.items() if role.discriminator is None
        }
        """Roles that are models, and no discriminators."""
        for name, role in self.models.items():
            for problem in family.each_clip_problem(config, info, transformer_config(role)):
                raise WeightsError(f"role {name!r} and the VAE of {source}: {problem}")
        configs = map(transformer_config, self.models.values())
        self.transformer = next(configs, None) or family.describe(source).main
        """Configuration of the run's transformers, of ``source`` where there are no roles."""
        self._family: DiffusersFamily[Any] = family
        self._clip_shapes = family.clip_shapes(config)
        self._largest_clip = (config.num_frames, config.height, config.width)
        self.frames_a_latent = info.stride_t
        """Pixel frames that the VAE makes one latent frame of, after the first."""
        self.condition_rows = family.condition_rows(self.transformer, config)
        """By name, the shape of one row of each tensor of a condition."""
        for name, role in self.models.items():
            rows = family.condition_rows(transformer_config(role), config)
            if rows != self.condition_rows:
                raise WeightsError(
                    f"role {name!r} reads {dict(rows)} of a condition and role "
                    f"{next(iter(self.models))!r} {dict(self.condition_rows)}, and one condition "
                    "goes to all of them. Use models of one kind"
                )
        strides = (info.stride_t, info.stride_hw)
        super().__init__(
            bundle,
            kind=family.kind,
            capabilities=family.capabilities(config),
            latent_shape=info.shape(config.num_frames, config.height, config.width),
            other_shapes=[info.shape(*clip) for clip in self._clip_shapes],
            statistics=statistics,
            codec=codec
            or self.codec_class(family.kind.vae, source, strides=strides, device=device_of(bundle)),
            encoders=encoders,
            batch_guidance=config.cfg_batched,
        )

    def predict_velocity(
        self,
        role: RoleHandle,
        module: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        """See ``FlowMatchingAdapter.predict_velocity``; the call is ``call_model``."""
        tensors = read_condition(cond, self.condition_rows, x_t.device)
        return self.call_model(role, {"latents": x_t, "t": t, **tensors}).float()

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        """Call the transformer; by default the family's ``call_model``.

        A family whose call depends on its ``config`` overrides it.
        """
        return self._family.call_model(role, inputs)

    def encode(self, video: Tensor) -> Tensor:
        """See ``FlowMatchingAdapter.encode``; clips of the run's size alone.

        Raises:
            DataError: other frames, height or width. A VAE would drop frames that fill no latent
                one, and make latents of any size, which no model of the run takes.
        """
        shape = tuple(video.shape[2:])
        if shape not in self._clip_shapes:
            known = " or ".join(" x ".join(map(str, clip)) for clip in self._clip_shapes)
            raise DataError(
                f"clips are {' x '.join(map(str, shape))} (frames x height x width), and the "
                f"models take {known}. Cut, scale and crop them before"
            )
        return super().encode(video)

    def given_pixels(
        self,
        readable: FrameConditions,
        rows: int,
        images: Tensor,
        frames: int | None,
        last: Tensor | None,
    ) -> GivenPixels:
        """Check what ``ImageConditioning.with_image`` is given, for a condition of ``rows`` rows.

        Args:
            readable: which frames the models can be given.

        Raises:
            ConditioningError: they can not be given these; or pictures are of another size than the
                run's clips, or not one a row.
        """
        first = images if images.dim() == 5 else images.unsqueeze(-3)
        given = GivenFrames(first=first.shape[-3], last=last is not None)
        if (problem := readable.problem(given)) is not None:
            raise ConditioningError(problem)
        clips = [self._largest_clip, *sorted(self._clip_shapes, reverse=True)]
        pictures = [first.select(-3, 0), *([] if last is None else [last])]
        sizes = {tuple(picture.shape) for picture in pictures}
        fitting = [
            clip for clip in clips if sizes == {(rows, 3, *clip[1:])} and frames in (None, clip[0])
        ]
        if not fitting:
            known = dict.fromkeys(f"[{rows}, 3, {h}, {w}]" for _, h, w in clips)
            raise ConditioningError(
                f"pictures are {' and '.join(str(list(size)) for size in sorted(sizes))}, they "
                f"must be {' or '.join(known)}: one a row of the condition, of the size of the "
                "run's clips. Scale and crop them before"
            )
        if (problem := readable.problem(given, fitting[0][0])) is not None:
            raise ConditioningError(problem)
        device = self._statistics.mean.device
        return GivenPixels(
            first=first.to(device).float(),
            last=None if last is None else last.to(device).float().unsqueeze(2),
            frames=fitting[0][0],
        )

    def feature_layout(self, role: RoleHandle, module: str, x_t: Tensor) -> FeatureLayout:
        """See ``FlowMatchingAdapter.feature_layout``."""
        patches = [n // p for n, p in zip(x_t.shape[2:], patch_size(self.transformer), strict=True)]
        return FeatureLayout(blocks=self.blocks, patches=patches, output=self.block_output)


def transformer_config(role: RoleHandle) -> Mapping[str, object]:
    """Return the full configuration of a role's transformer; several experts are built alike."""
    module: Any = next(iter(role.modules.values()))
    return dict(module.config)
