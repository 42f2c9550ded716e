"""How a model is called. When a model is updated is the method's business.

Small Protocols, one per need; a method asks only for those that it uses. All tensors at this
boundary are normalised latents [B, C, T, H, W] in fp32 unless a name says otherwise, and t is a
float tensor [B] in [0, 1000], t = 1000 sigma, never cast to bf16 or int. Where the capability
``supports_frame_times`` is given, t may be [B, T], one a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from distill_protocols.batch import Condition
from distill_protocols.capabilities import Capabilities, PredType
from distill_protocols.causal import Chunk, ChunkCall, CleanPast
from distill_protocols.plugins import ExportRequest, RoleSpec
from distill_protocols.random import RowGenerators
from distill_protocols.sampler import SamplerSpec
from distill_protocols.weights import WeightSource


class NoiseSchedule(Protocol):
    """Flow matching: ``x_t = (1 - s) x0 + s eps``, ``v = eps - x0``. All in fp32 or wider."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t. Exactly ``x0`` at t = 0 and exactly ``noise`` at t = 1000."""
        ...

    def pred_to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        """Clean latents from a prediction of ``pred_type``."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, pred_type: PredType = "v") -> Tensor:
        """What a model that predicts ``pred_type`` should return at (x0, noise, t)."""
        ...


class Denoiser(Protocol):
    """One model call."""

    def forward(
        self,
        role: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        fwd_pred_type: PredType = "v",
        neg_cond: Condition | None = None,
        cfg: float | None = None,
        caches: ChunkCall | CleanPast | None = None,
        features: MutableMapping[int, Tensor | None] | None = None,
    ) -> Tensor:
        """The prediction of ``role``, of type ``fwd_pred_type``, fp32.

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
        """Logits of the heads ``role`` [B, heads], fp32, in the order of its ``heads.blocks``.

        Above 0 a head holds the clip for real. A row's logits depend on that row alone.

        Args:
            features: of the blocks ``RoleHandle.heads`` names, as ``Denoiser.forward`` gives them.

        Raises:
            ContractError: ``role`` is no heads, or ``features`` are those of other blocks.
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
    def normalize_latents(self, latents: Tensor) -> Tensor:
        """(z - mean) / std per channel."""
        ...

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """z std + mean per channel."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, 3, F, H_px, W_px] in [0, 1] from normalised latents, without gradient."""
        ...


class ConditionEncoder(Protocol):
    """From what a person writes to what the model reads."""

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition: ...
    def encode_neg_condition(self, raw_neg_cond: str) -> Condition:
        """One row."""
        ...

    def condition_fingerprint(self) -> str | None:
        """Hash of the encoder's weights and settings: a cached embedding is valid under it only.

        None where the run has no encoder, because all conditions are stored.
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


class Sampler(Protocol):
    """From noise to clean latents, by one spec."""

    def sample(
        self,
        role: str,
        spec: SamplerSpec,
        noise: Tensor,
        cond: Condition,
        *,
        neg_cond: Condition | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
        seen: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Normalised clean latents [B, C, T, H, W].

        Args:
            generators: feed a stochastic spec, one a row, so that no clip depends on its
                neighbours in the batch.
            poll: called before each of the sampler's steps; what it raises ends the sampling
                (``StopFlag.poll``).
            seen: called before each step with its number and x_t at ``spec.sigmas()`` of it: of
                step 0 that is ``noise``. What it is given never changes. Only of roles that are
                not causal: a causal one has no x_t of a whole clip.
        """
        ...

    def rollout(
        self,
        role: str,
        spec: SamplerSpec,
        noise: Tensor,
        cond: Condition,
        *,
        exits: Sequence[int],
        learns: Sequence[bool] | None = None,
        generators: RowGenerators | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Tensor:
        """The role's clean latents [B, C, T, H, W] as training takes them: sampled by ``spec``, but
        each chunk left at its exit step, whose call alone is made with gradient.

        The calls that sampling would still make are never made. A chunk becomes past without
        gradient, so a chunk's loss reaches its own exit call and nothing else. Caches are clear
        before and after, also where this raises. Without gradient, and with the last step as exit
        of every chunk, it is ``sample``.

        Args:
            noise: T may be another than that of the run's clips where the role is causal.
            exits: k in 0 .. spec.steps - 1 of each chunk (``CausalRollout.chunks``; one of a role
                that is not causal). Ranks that share a sharded role must use the same.
            learns: whether a chunk's exit call is made with gradient, where the caller's mode
                allows it; None: all of them.
        """
        ...


class ExpertRouting(Protocol):
    """Roles of several modules, each for a range of t (``supports_expert_routing``)."""

    def expert_of(self, role: str, t: Tensor) -> str:
        """Module of ``role`` that a call at ``t`` goes to.

        On a CPU tensor it costs nothing; on another device the host waits for it.

        Raises:
            ContractError: the times lie in more than one range: a call has one expert.
        """
        ...

    def expert_ranges(self, *roles: str) -> tuple[tuple[float, float], ...]:
        """Rising ranges [low, high) of t that fill [0, 1000]; 1000 itself is in the last.

        Within one, no role of ``roles`` changes its expert: t of a batch that all of them shall be
        called with must come from one range. A single range where none has experts.
        """
        ...


class ImageConditioning(Protocol):
    """Conditions with a picture (``supports_image_condition``)."""

    def trained_frames(self, cond: Condition) -> Tensor | None:
        """1 where the model predicts and 0 where the condition says what is there, fp32,
        [1, 1, T, 1, 1]; None: it predicts everything.

        Predictions of v and eps mean nothing where it is 0 and must stay out of a loss; of x0 they
        are what the condition says.
        """
        ...

    def with_image(self, cond: Condition, images: Tensor) -> Condition:
        """``cond`` and what the model reads of a first frame [B, 3, H_px, W_px] in [0, 1].

        Raises:
            ConditioningError: the model reads none, or the picture has another size than clips.
        """
        ...


class DistillAdapter(
    NoiseSchedule,
    Denoiser,
    LatentCodec,
    ConditionEncoder,
    CausalRollout,
    Sampler,
    ExpertRouting,
    ImageConditioning,
    Protocol,
):
    """One family's adapter: everything above, and what it supports of it. What it does not
    support is never asked for."""

    @property
    def capabilities(self) -> Capabilities: ...


class Exporter(Protocol):
    """Writes one role where other tools can read it."""

    def export(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> Mapping[str, Any]:
        """Write ``folder`` whole or not at all, tensor by tensor.

        Returns facts; ``notes`` among them are lines that a person should read.

        Args:
            role: where it came from: its path says how it is built, and is the base of a LoRA.
            weights: by module, whole; or of a LoRA role the adapters alone.

        Raises:
            OutputError: ``folder`` holds something else, or cannot be written.
            WeightsError: keys are missing or unexpected, or a component to copy is damaged.
        """
        ...

    def verify(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> Mapping[str, Any]:
        """Read ``folder`` with the reader that it is for, and compare with ``weights``.

        Returns what was compared; ``notes`` say it in lines to read.

        Raises:
            WeightsError: a key is unmatched, or an output differs from that of ``weights``.
        """
        ...
