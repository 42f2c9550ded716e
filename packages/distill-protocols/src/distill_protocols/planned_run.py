"""A run as it stands in its file, for rules across sections. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from attrs import field, frozen

from distill_protocols.capabilities import Capabilities
from distill_protocols.causal import Chunk
from distill_protocols.problems import Problem
from distill_protocols.roles import RoleSpec
from distill_protocols.sampler import DynamicShift, SamplerSpec

MAX_T = 1000.0
"""t of pure noise."""


@frozen(kw_only=True)
class PlannedRun:
    """A run as its file describes it: what rules of methods and callbacks may read, without
    torch.

    Attributes:
        roles: by name.
        unread: names of roles that stand in the file, but have problems of their own.
        averaged: roles of which some callback keeps an average.
        student_sampler: the method's own, where it states one.
        has_negative: whether there will be a negative condition.
        reads_negative: whether calls with these guidances read one (``Capabilities``).
        experts: names of the roles that have more than one expert; None: not known.
        boundaries: by role, of those that have two experts, the t from which on the one for high
            noise levels is called.
        time_limits: by role, the t [low, high) that it can be called at, of those that have one
            expert of several (``RoleOptions.experts``) or a model that knows no other times; 1000
            is in the last range.
        pictured: names of the roles that cannot be called without given frames, and get none.
        clip_frames: latent frames of the run's clips, those of the largest first; empty: not known.
        chunks: divides a video of a number of latent frames as a role, by name, does; None: not
            known.
    """

    roles: Mapping[str, RoleSpec]
    unread: frozenset[str] = frozenset()
    averaged: frozenset[str] = frozenset()
    student_sampler: SamplerSpec | None = None
    has_negative: bool = True
    reads_negative: Callable[..., bool] = Capabilities().reads_negative
    experts: frozenset[str] | None = None
    boundaries: Mapping[str, float] = field(factory=dict)
    time_limits: Mapping[str, tuple[float, float]] = field(factory=dict)
    pictured: frozenset[str] = frozenset()
    clip_frames: tuple[int, ...] = ()
    chunks: Callable[[str, int], tuple[Chunk, ...]] | None = None

    @property
    def single(self) -> frozenset[str]:
        """Names of the roles that have no expert for low noise levels beside another, and so no
        use for a guidance of its own; none where it is not known."""
        if self.experts is None:
            return frozenset()
        low_noise = {name for name, (_, high) in self.time_limits.items() if high < MAX_T}
        return frozenset(self.roles) - self.experts - low_noise

    def has_past(self, role: str) -> bool:
        """Whether ``role`` makes a clip chunk by chunk, each from those before it."""
        if self.chunks is None:
            return False
        return any(len(self.chunks(role, frames)) > 1 for frames in self.clip_frames)

    def missed_steps(self, role: str, sampler: SamplerSpec) -> tuple[float, ...]:
        """t of the calls that ``role`` cannot make, as neither its model nor the expert that it has
        knows them: of steps, and of a causal role's finished chunks."""
        limits = self.time_limits.get(role)
        if limits is None or isinstance(sampler.shift, DynamicShift):
            return ()
        low, high = limits
        times = [1000 * sigma for sigma in sampler.sigmas()]
        if self.has_past(role):
            times.append(sampler.context_noise)
        return tuple(t for t in times if not low <= t < high and not t == high == MAX_T)

    def describe_limits(self, role: str) -> str:
        """Say which of ``time_limits`` a role has, and why: the beginning of a sentence."""
        low, high = self.time_limits[role]
        reason = (
            "one of its model's experts"
            if self.roles[role].experts
            else "a model that knows no other times"
        )
        return f"{role!r} has {reason}, called at t from {low:g} to {high:g}"

    def role_problems(self, role: str, *, ema: bool = False) -> Iterator[Problem]:
        """What is wrong with naming ``role`` (and its average): pairs of key and message."""
        if role in self.unread:
            return
        if role not in self.roles:
            has = ", ".join(self.roles) or "none"
            yield Problem("role", f"there is no role {role!r} (this run has: {has})")
        elif ema and role not in self.averaged:
            kept = ", ".join(sorted(self.averaged)) or "none"
            yield Problem(
                "ema",
                f"no average of {role!r} is kept (averages: {kept}); let the ema callback average "
                "that role, or use the live weights",
            )

    def sampler_problems(
        self, sampler: SamplerSpec | None, role: str | None = None
    ) -> Iterator[Problem]:
        """What is wrong with sampling so, and with sampling ``role`` so."""
        spec = sampler or self.student_sampler
        if spec is None:
            yield Problem("sampler", "missing, and the method states no way to sample its student")
            return
        if role is not None and role in self.roles and self.roles[role].heads is not None:
            yield Problem(
                "role", f"{role!r} is a discriminator, which makes no clips. Name another role"
            )
        if role in self.pictured:
            yield Problem(
                "role",
                f"{role!r} is an image-to-video model, and prompts alone bring no first frame to "
                "sample it from. In validation, name one a prompt (validation.images, and "
                "last_images for a model of first and last frames); elsewhere leave this out, and "
                "look at the export through its own pipeline",
            )
        if spec.guidance_2 is not None and role in self.single:
            yield Problem(
                "sampler.guidance_2",
                f"{spec.guidance_2:g} is of a second expert, and {role!r} has one, which would "
                "never have it. Leave it out",
            )
        if role is not None and (missed := self.missed_steps(role, spec)):
            way_out = (
                "Leave this out and look at the export, whose folder has the path's other expert "
                "in it; or name a role that has both"
                if self.roles[role].experts
                else "Write timesteps within these"
            )
            yield Problem(
                "role",
                f"{self.describe_limits(role)}, and this sampler also takes t = "
                f"{', '.join(f'{t:.6g}' for t in missed)}. {way_out}",
            )
        if self.reads_negative(*spec.guidances) and not self.has_negative:
            w = next(w for w in spec.guidances if w != 1)
            yield Problem(
                "sampler.guidance",
                f"{w:g} needs a negative condition, u + w (c - u), and there is none; "
                "write conditioning.negative_prompt, or use guidance: 1",
            )
