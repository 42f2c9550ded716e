"""What an adapter can do, as a value. No torch: the config check reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from attrs import field, fields, frozen

from distill_protocols.errors import CapabilityError
from distill_protocols.sampler import Solver

PredType = Literal["v", "x0", "eps"]
"""What a model call returns: velocity ``eps - x0``, clean latents, or noise."""

ONE_TENSOR = "one_latent_tensor"
"""What a method needs that cannot train latents of several parts."""


@frozen(kw_only=True)
class Capabilities:
    """What an adapter supports. A method names what it needs; the check runs at construction.

    Attributes:
        supports_features: ``forward`` fills ``features``, a role may be a discriminator on them,
            and the adapter has ``discriminators``.
        supports_kv_cache: causal roles take ``ChunkCall``, one chunk at a time, and the adapter has
            ``causal``.
        supports_expert_routing: a role may have several modules, each for a range of t, or know
            some t alone, and the adapter has ``experts``.
        supports_image_condition: a condition may hold a picture, and the adapter has ``images``.
        supports_teacher_forcing: causal roles take ``CleanPast``.
        supports_frame_times: t may be [B, T], a time of its own for each frame, for any role.
        supports_exits: a role may have an embedding of exit steps (``RoleSpec.exits``), and the
            adapter has ``exits``.
        supports_flow_maps: a role may be told the time that a call leads to
            (``RoleSpec.target_time``), and the adapter has ``flow_maps``.
        supports_latent_parts: clips of this run are several named tensors, and the adapter has
            ``parts``.
        supports_jvp: a call can be differentiated along a direction: the adapter has ``tangents``.
        embeds_guidance: guidance w is an input of the models, so that a guided call is one, and
            reads no negative condition unless w is 0.
        solvers: those of ``SamplerSpec`` that ``sample`` knows.
        causal_roles: roles of this run whose chunks do not see later ones; all others see the
            whole clip.
    """

    supports_cfg: bool = False
    supports_kv_cache: bool = False
    supports_teacher_forcing: bool = False
    supports_frame_times: bool = False
    supports_features: bool = False
    supports_expert_routing: bool = False
    supports_image_condition: bool = False
    supports_decode: bool = False
    supports_exits: bool = False
    supports_flow_maps: bool = False
    supports_latent_parts: bool = False
    supports_jvp: bool = False
    embeds_guidance: bool = False
    supported_pred_types: frozenset[PredType] = field(default=frozenset({"v"}), converter=frozenset)
    solvers: frozenset[Solver] = field(default=frozenset({"euler"}), converter=frozenset)
    causal_roles: frozenset[str] = field(default=frozenset(), converter=frozenset)

    def reads_negative(self, *guidances: float) -> bool:
        """Return whether a call with one of ``guidances`` reads a negative condition."""
        return any(w == 0 if self.embeds_guidance else w != 1 for w in guidances)

    def missing(self, needed: Iterable[str]) -> tuple[str, ...]:
        """Return names in ``needed`` that are not true here.

        ``pred:x0`` asks for a prediction type, ``causal:student`` for a role that is causal,
        ``one_latent_tensor`` for clips that are not several named ones.

        Raises:
            CapabilityError: a name that no adapter could have.
        """
        known = {f.name for f in fields(type(self)) if f.name.startswith("supports_")}
        lacking = []
        for name in needed:
            if name.startswith("pred:"):
                have = name.removeprefix("pred:") in self.supported_pred_types
            elif name.startswith("causal:"):
                have = name.removeprefix("causal:") in self.causal_roles
            elif name == ONE_TENSOR:
                have = not self.supports_latent_parts
            elif name in known:
                have = bool(getattr(self, name))
            else:
                raise CapabilityError(
                    f"{name!r} is no capability; there are {', '.join(sorted(known))} and "
                    f"'pred:v', 'pred:x0', 'pred:eps', 'causal:<role>', '{ONE_TENSOR}'. The method "
                    "that asks for it must be mended."
                )
            if not have:
                lacking.append(name)
        return tuple(lacking)

    def require(self, needed: Iterable[str], *, by: str) -> None:
        """Raise ``CapabilityError`` naming every capability of ``needed`` that is missing."""
        lacking = self.missing(needed)
        if lacking:
            raise CapabilityError(
                f"{by} needs {', '.join(lacking)}, which this adapter does not have. A method can "
                "only use what its adapter states, so that it fails now and not mid-run. Choose "
                "another method, or another option of it, or a family that supports this."
            )
