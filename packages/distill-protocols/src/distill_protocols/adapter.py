"""How a model is called. When a model is updated is the method's business.

Small Protocols, one per need; a method asks only for those that it uses. All tensors at this
boundary are normalised latents [B, C, T, H, W] in fp32 unless a name states otherwise, and t is a
float tensor [B] in [0, 1000], t = 1000 sigma, never cast to bf16 or int. Where the capability
``supports_frame_times`` is given, t may be [B, T], one a frame.

Where a signature has ``Latents``, the clips of a run with ``supports_latent_parts`` are
``LatentParts``, all of which have the same t; those of any other run are one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from distill_protocols.batch import Condition
from distill_protocols.capabilities import Capabilities, PredType
from distill_protocols.causal import Chunk, ChunkCall, CleanPast
from distill_protocols.fingerprint import Fingerprint
from distill_protocols.latents import LatentParts, Latents, LatentShape, LatentsT, PartShapes
from distill_protocols.random import RowGenerators
from distill_protocols.sampler import SamplerSpec


class NoiseSchedule(Protocol):
    """Flow matching: ``x_t = (1 - s) x0 + s eps``, ``v = eps - x0``. All in fp32 or wider."""

    def add_noise(self, x0: LatentsT, noise: LatentsT, t: Tensor) -> LatentsT:
        """x_t. Exactly ``x0`` at t = 0 and exactly ``noise`` at t = 1000."""
        ...

    def pred_to_x0(
        self, pred: LatentsT, x_t: LatentsT, t: Tensor, pred_type: PredType = "v"
    ) -> LatentsT:
        """Clean latents from a prediction of ``pred_type``."""
        ...

    def target(
        self, x0: LatentsT, noise: LatentsT, t: Tensor, pred_type: PredType = "v"
    ) -> LatentsT:
        """What a model that predicts ``pred_type`` should return at (x0, noise, t)."""
        ...


class Denoiser(Protocol):
    """One model call."""

    def forward(
        self,
        role: str,
        x_t: LatentsT,
        t: Tensor,
        cond: Condition,
        *,
        fwd_pred_type: PredType = "v",
        neg_cond: Condition | None = None,
        cfg: float | None = None,
        caches: ChunkCall | CleanPast | None = None,
        features: MutableMapping[int, Tensor | None] | None = None,
    ) -> LatentsT:
        """Return the prediction of ``role``, of type ``fwd_pred_type``, fp32.

        Args:
            cfg: guidance w, ``u + w (c - u)``; None or 1 calls the model once, on ``cond``.
            neg_cond: needed where ``cfg`` is neither None nor 1; one row, or one a sample.
            caches: for a causal role: that ``x_t`` is one chunk after a cached past
                (``supports_kv_cache``), or a clip beside a clean one
                (``supports_teacher_forcing``). None: ``x_t`` is a whole clip, each chunk of which
                sees itself and the chunks before it.
            features: filled in place: for each block index that is a key, what that block gives,
                fp32 [B, D, T', H', W'], one a token at its place in the clip; with gradient where
                the call has it (``supports_features``).

        Raises:
            ConditioningError: guidance without ``neg_cond``.
            CapabilityError: ``features`` with guidance, where there are two calls and two of each,
                or of a role that cannot give them.
            ContractError: a key of ``features`` that is no block of the role.
        """
        ...


class Discriminating(Protocol):
    """Roles that are heads on another's features (``supports_features``)."""

    def discriminate(self, role: str, features: Mapping[int, Tensor]) -> Tensor:
        """Logits of the heads ``role`` [B, heads], fp32, in the order of its blocks.

        Above 0 a head holds the clip for real. A row's logits depend on that row alone.

        Args:
            features: of the blocks that ``RoleHandle.discriminator`` names, as ``Denoiser.forward``
                gives them.

        Raises:
            ContractError: ``role`` is no heads, or ``features`` are those of other blocks.
        """
        ...


class ExitConditioning(Protocol):
    """Roles that are told how a clip was made (``supports_exits``): a critic of a student that is
    trained at several steps of its sampler, whose clips have a distribution for each.

    A learned embedding of the exit step, zero at first, is added to the time embedding.
    ``Denoiser.forward`` calls such a role without it.
    """

    def exit_count(self, role: str) -> int:
        """Return the number of exit steps that ``role`` knows; 0: it is told none."""
        ...

    def forward_at_exits(
        self,
        role: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        exits: Tensor,
        fwd_pred_type: PredType = "v",
    ) -> Tensor:
        """Return what ``role`` predicts of clips that left the sampler at ``exits``, fp32.

        Args:
            t: [B].
            exits: exit steps, int64 in 0 .. ``exit_count`` - 1: [1 or B, 1], or one a frame
                [1 or B, T] (``supports_frame_times``).

        Raises:
            ContractError: the role is told no exits, or ``exits`` have another shape.
            CapabilityError: exits by frame of a family whose models have one time a clip.
        """
        ...


class FlowMaps(Protocol):
    """Roles that predict average velocities (``supports_flow_maps``): ``u(x_t, t, r)`` with
    ``x_r = x_t - (s_t - s_r) u`` for the solution x of an ODE from t to r (MeanFlow, Geng et al.
    2025, eq. 3).

    ``Sampler`` calls such a role with r = the time of the next step, and ``Denoiser.forward`` with
    r = t, where u is the velocity.
    """

    def forward_to(
        self,
        role: str,
        x_t: Tensor,
        t: Tensor,
        target_t: Tensor,
        cond: Condition,
    ) -> Tensor:
        """Return u of ``role`` from t to r, like ``x_t``, fp32.

        Args:
            t: [B].
            target_t: r, like ``t`` and at most it.

        Raises:
            ContractError: the role is no flow map, or ``target_t`` has another shape.
        """
        ...


class Tangents(Protocol):
    """Forward-mode differentiation (``supports_jvp``): what continuous-time consistency needs."""

    def forward_jvp(
        self, role: str, x_t: Tensor, t: Tensor, cond: Condition, *, dx: Tensor, dt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """v of ``role`` at (x_t, t), and ``d/dh v(x_t + h dx, t + h dt)`` at h = 0: the product of
        the Jacobian with the direction. Both like ``x_t``, fp32, without gradient.

        Args:
            dx: like ``x_t``.
            dt: like ``t``, in its units.
        """
        ...


class LatentCodec(Protocol):
    """Between the package boundary, the model and pixels."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one clip of this run."""
        ...

    def to_model_layout(self, latents: Tensor) -> Tensor: ...
    def from_model_layout(self, latents: Tensor) -> Tensor: ...
    def normalize_latents(self, latents: LatentsT) -> LatentsT:
        """(z - mean) / std per channel."""
        ...

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """z std + mean per channel."""
        ...

    def latent_fingerprint(self) -> Fingerprint:
        """What computes latents, as ``ConditionEncoder.condition_fingerprint`` does for conditions:
        the VAE's weights and settings, and the statistics that latents are normalised with."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Raw (not normalised) latents [B, C, T, H, W] of clips [B, 3, F, H_px, W_px] in [0, 1]."""
        ...

    def decode(self, latents: Latents) -> Tensor:
        """Clips [B, 3, F, H_px, W_px] in [0, 1] from normalised latents (of several parts the main
        one), without gradient."""
        ...


class ConditionEncoder(Protocol):
    """From what a person writes to what the model reads."""

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition: ...
    def encode_neg_condition(self, raw_neg_cond: str) -> Condition:
        """One row."""
        ...

    def condition_fingerprint(self) -> Fingerprint:
        """What computes conditions, as named entries: a stored condition is valid under the same
        ones only. Values are hashes (weights, tokenizers) or short texts (precision, length), and
        names are dotted, ``text_encoder.weights``, with the component first.

        Entries of parts that are not on this machine are left out; nothing is downloaded for it.
        """
        ...

    def keep_encoders_loaded(self) -> AbstractContextManager[object]:
        """Within: what encodes conditions stays loaded, for many encodings after each other.

        Outside, an encoding may read its encoder and free it again.
        """
        ...


class CausalRollout(Protocol):
    """Chunk by chunk with key/value caches (``supports_kv_cache``; see ``ChunkCall``).

    A rollout clears before its first chunk and after its last; weights that change within one
    would read keys that other weights made.
    """

    def chunks(self, role: str, frames: int | None = None) -> tuple[Chunk, ...]:
        """How ``role`` divides a video of ``frames`` latent frames; None: of a clip of this run.

        One chunk that is the whole video, where the role is not causal. The last may be shorter.
        """
        ...

    def clear_caches(self, role: str, *, stream: str | None = None) -> None:
        """Forget the past of ``role``: of one stream, or of all."""
        ...

    def extend(
        self,
        role: str,
        spec: SamplerSpec,
        noise: Tensor,
        cond: Condition,
        *,
        first_frame: int,
        stream: str,
        exit_steps: Sequence[int],
        requires_grad: Sequence[bool] | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        """Return the next frames of a video as training takes them: ``Sampler.rollout``, but that
        it goes on from the past of ``stream``, which it leaves longer by these frames, detached.

        The past lasts until ``clear_caches``. Its keys stay as the weights of their time made them.

        Args:
            noise: of whole chunks [B, C, T, H, W].
            first_frame: place of its first frame in the video, where the past ends.
            exit_steps, requires_grad: of each of these chunks.

        Raises:
            ContractError: the frames are no whole chunks, or do not follow the past.
        """
        ...

    def rebuild_past(self, role: str, cond: Condition, *, stream: str) -> None:
        """Make the past of a video anew from the frames that are kept, under another condition and
        by the role's present weights: what is seen stays, what was asked for is forgotten
        (LongLive, Yang et al. 2025, KV recache)."""
        ...

    def past_state(self, role: str, *, stream: str) -> Mapping[str, object]:
        """Return the past of a video for a checkpoint: nested mappings, lists, numbers and tensors,
        which are the past's own and never written to again; empty where nothing is past."""
        ...

    def load_past(
        self, role: str, state: Mapping[str, object], cond: Condition, *, stream: str
    ) -> None:
        """Put back what ``past_state`` gave, in the place of the past of ``stream``.

        Args:
            cond: the condition that it was made under.
        """
        ...

    def stream(
        self,
        role: str,
        spec: SamplerSpec,
        noises: Iterable[Tensor],
        cond: Condition,
        *,
        neg_cond: Condition | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Generator[Tensor, None, None]:
        """Clean latents of a video, chunk by chunk, as ``noises`` are asked for.

        Args:
            noises: of each chunk [B, C, T of the chunk, H, W] (``chunks``), without an end if need
                be.
        """
        ...

    def decode_stream(self, latents: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Frames [B, 3, F, H_px, W_px] in [0, 1] of each chunk of a video, as ``latents`` come.

        All of them together are ``LatentCodec.decode`` of the chunks together; time and memory of
        a chunk do not depend on how many came before.

        Args:
            latents: normalised, of each chunk [B, C, T of the chunk, H, W] (``stream``).
        """
        ...


class Sampler(Protocol):
    """From noise to clean latents, by one spec."""

    def sample(
        self,
        role: str,
        spec: SamplerSpec,
        noise: LatentsT,
        cond: Condition,
        *,
        neg_cond: Condition | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
        on_step: Callable[[int, LatentsT], None] | None = None,
    ) -> LatentsT:
        """Normalised clean latents [B, C, T, H, W].

        Args:
            generators: feed a stochastic spec, one a row, so that no clip depends on its
                neighbours in the batch.
            poll: called before each of the sampler's steps; what it raises ends the sampling
                (``StopFlag.poll``).
            on_step: called before each step with its number and x_t at ``spec.sigmas()`` of it: of
                step 0 that is ``noise``. What it is given never changes. Only of roles that are
                not causal: a causal one has no x_t of a whole clip.
        """
        ...

    def rollout(
        self,
        role: str,
        spec: SamplerSpec,
        noise: LatentsT,
        cond: Condition,
        *,
        exit_steps: Sequence[int],
        requires_grad: Sequence[bool] | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
        on_step: Callable[[int, LatentsT], None] | None = None,
    ) -> LatentsT:
        """Return the role's clean latents [B, C, T, H, W] as training takes them: sampled by
        ``spec``, but each chunk left at its exit step, whose call alone is made with gradient.

        The calls that sampling would still make are never made. A chunk becomes past without
        gradient, so a chunk's loss reaches its own exit call and nothing else. Caches are clear
        before and after, also where this raises. Without gradient, and with the last step as exit
        of every chunk, it is ``sample``.

        Args:
            noise: T may be another than that of the run's clips where the role is causal.
            exit_steps: k in 0 .. spec.steps - 1 of each chunk (``CausalRollout.chunks``; one of a
                role that is not causal). Ranks that share a sharded role must use the same.
            requires_grad: whether a chunk's exit call is made with gradient, where the caller's
                mode allows it; None: all of them.
            on_step: see ``sample``; the exit step is the last that it is called before.
        """
        ...


class ExpertRouting(Protocol):
    """Roles of several modules, each for a range of t, or of one module that knows some t alone
    (``supports_expert_routing``)."""

    def expert_of(self, role: str, t: Tensor) -> str:
        """Module of ``role`` that a call at ``t`` goes to.

        On a CPU tensor it costs nothing; on another device the host waits for it.

        Raises:
            ContractError: the times lie in more than one range: a call has one expert. Or the
                role does not have that expert (``RoleOptions.experts``).
        """
        ...

    def expert_ranges(self, *roles: str) -> tuple[tuple[float, float], ...]:
        """Rising ranges [low, high) of t at which all of ``roles`` can be called; a range that ends
        at 1000 holds it.

        Within one, no role of ``roles`` changes its expert: t of a batch that all of them shall be
        called with must come from one range. They fill [0, 1000], unless a role has one expert of
        several, or a model that knows some t alone; a single range where none has experts.
        """
        ...


class ImageConditioning(Protocol):
    """Conditions with frames of the clip: the first one or several, and the last
    (``supports_image_condition``; ``FamilyPlugin.frame_conditions`` says which)."""

    def trained_frames(self, cond: Condition, frames: int | None = None) -> Tensor | None:
        """1 where the model predicts and 0 where the condition states what is there, fp32,
        [1, 1, T, 1, 1]; None: it predicts everything.

        Args:
            frames: T; None: that of ``latent_shape``. It is given in a run whose clips differ.

        Predictions of v and eps mean nothing where it is 0 and must stay out of a loss; of x0 they
        are what the condition states.
        """
        ...

    def with_image(
        self,
        cond: Condition,
        images: Tensor,
        frames: int | None = None,
        last: Tensor | None = None,
    ) -> Condition:
        """``cond`` and what the model reads of frames of its clips, in [0, 1].

        Args:
            images: first frames [B, 3, H_px, W_px]; or several of each clip, which goes on from
                them, [B, 3, K, H_px, W_px].
            frames: of pixels, of the clip that begins so; None: those of the run's largest clip of
                this size. It is given wherever the clip is known.
            last: last frames [B, 3, H_px, W_px]. It is given only where there are any.

        Raises:
            ConditioningError: the model reads no such frames (``FrameConditions.problem``), or they
                have another size than clips.
        """
        ...


class JointLatents(Protocol):
    """Clips whose latents are several named tensors (``supports_latent_parts``)."""

    def part_shapes(self, main: LatentShape) -> PartShapes:
        """Shapes of all parts of a clip whose main part has the shape ``main``, it first."""
        ...

    @property
    def part_weights(self) -> Mapping[str, float]:
        """What the mean of each part counts in a loss, by name."""
        ...


class OptionalContracts(Protocol):
    """What an adapter may support beyond calling and sampling its models.

    Each is None exactly where ``capabilities`` does not state it, so that what a family does not
    have cannot be called.
    """

    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def causal(self) -> CausalRollout | None:
        """Where some role of the run is causal (``supports_kv_cache``)."""
        ...

    @property
    def experts(self) -> ExpertRouting | None:
        """``supports_expert_routing``."""
        ...

    @property
    def images(self) -> ImageConditioning | None:
        """``supports_image_condition``."""
        ...

    @property
    def discriminators(self) -> Discriminating | None:
        """``supports_features``."""
        ...

    @property
    def tangents(self) -> Tangents | None:
        """``supports_jvp``."""
        ...

    @property
    def exits(self) -> ExitConditioning | None:
        """``supports_exits``."""
        ...

    @property
    def flow_maps(self) -> FlowMaps | None:
        """``supports_flow_maps``."""
        ...

    @property
    def parts(self) -> JointLatents | None:
        """``supports_latent_parts``."""
        ...


class DistillAdapter(
    NoiseSchedule,
    Denoiser,
    LatentCodec,
    ConditionEncoder,
    Sampler,
    OptionalContracts,
    Protocol,
):
    """One family's adapter: the mandatory contracts, and the optional ones as attributes."""


def draw_noise(adapter: OptionalContracts, shape: LatentShape, rows: RowGenerators) -> Latents:
    """Draw the noise that clips begin with, fp32: of each part in turn, as pipelines do.

    Args:
        shape: (C, T, H, W) of a clip, of several parts that of the main one.
        rows: one generator a clip.
    """
    if not adapter.capabilities.supports_latent_parts or adapter.parts is None:
        return rows.normal(shape)
    shapes = adapter.parts.part_shapes(shape)
    return LatentParts({name: rows.normal(part) for name, part in shapes.items()})
