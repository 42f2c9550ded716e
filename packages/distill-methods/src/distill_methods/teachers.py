"""One frozen teacher or several, each with its guidance. No torch: plans need them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from attrs import field, frozen
from attrs.validators import optional
from distill_protocols import PlannedRun, Problem, RoleNeed
from distill_protocols.validators import at_least

from distill_methods.latent_config import LatentMethodConfig
from distill_methods.roles import CRITIC, DISCRIMINATOR, STUDENT, TEACHER

AWAY = "u + w (c - u) with w < 0 leads away from the prompt"
_TAKEN = (STUDENT.name, CRITIC.name, DISCRIMINATOR)

Guidances = tuple[float, float]
"""w at high noise levels and at low ones: of two experts, each has its own."""


@frozen(kw_only=True)
class TeacherTerm:
    """One of several teachers.

    Attributes:
        weight: its part of the prediction that the student learns from; all of them add up to 1.
            A negative one pushes away from what its teacher makes.
        guidance_scale: its w in ``u + w (c - u)``; left out, the method's.
        guidance_scale_2: the same of its low-noise expert, where it has two; left out,
            ``guidance_scale``, or the method's where that is left out too.
    """

    weight: float
    guidance_scale: float | None = field(default=None, validator=optional(at_least(0, AWAY)))
    guidance_scale_2: float | None = field(default=None, validator=optional(at_least(0, AWAY)))


def _teachers(_config: Any, _: Any, value: Mapping[str, TeacherTerm]) -> None:
    total = sum(term.weight for term in value.values())
    if value and not abs(total - 1) <= 1e-6:  # nan is not
        raise ValueError(
            f"the weights ({', '.join(f'{n} {t.weight:g}' for n, t in value.items())}) add up to "
            f"{total:g} and must to 1: the weighted sum is a clean clip, and would be a scaled one"
        )
    for name in _TAKEN:
        if name in value:
            raise ValueError(f"{name!r} has a place of its own and can be no teacher; name another")


@frozen(kw_only=True)
class TeachersConfig(LatentMethodConfig):
    """Base of the configs of methods with frozen teachers.

    Attributes:
        teachers: several teachers by role, in the place of the one role ``teacher``: what the
            student learns from is the weighted sum of their predictions.
    """

    teachers: Mapping[str, TeacherTerm] = field(
        factory=dict, converter=lambda given: MappingProxyType(dict(given)), validator=_teachers
    )

    @property
    def guidance_keys(self) -> tuple[str, str]:
        """Names of the options with w of a teacher that has none of its own, and of its low-noise
        expert's."""
        return "guidance_scale", "guidance_scale_2"

    @property
    def common_guidances(self) -> tuple[float, float | None]:
        """The values of ``guidance_keys``."""
        raise NotImplementedError

    @property
    def terms(self) -> Mapping[str, tuple[float, Guidances]]:
        """By teacher: its weight, and its guidances."""
        return {name: (t.weight, self._guidances(t)) for name, t in self._given.items()}

    @property
    def teacher_needs(self) -> tuple[RoleNeed, ...]:
        """The frozen roles among those that are called."""
        return tuple(RoleNeed(name=n, trainable=False, help=TEACHER.help) for n in self._given)

    @property
    def teacher_guided(self) -> bool:
        """Whether a teacher is called with a negative condition."""
        return any(w != 1 for _, ws in self.terms.values() for w in ws)

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from self.teacher_problems(run.single)

    def teacher_problems(self, single: Collection[str]) -> Iterator[Problem]:
        """Guidances of experts that no teacher has: pairs of a key and a message.

        Args:
            single: roles of one expert.
        """
        _, key = self.guidance_keys
        low = self.common_guidances[1]
        takers = [
            n for n, t in self._given.items() if t.guidance_scale is t.guidance_scale_2 is None
        ]
        if low is not None and all(name in single for name in takers):
            yield Problem(key, _never_used(low, " or ".join(map(repr, takers)) or "no teacher"))
        for name, term in self.teachers.items():
            if term.guidance_scale_2 is not None and name in single:
                yield Problem(
                    f"teachers.{name}.guidance_scale_2",
                    _never_used(term.guidance_scale_2, repr(name)),
                )

    @property
    def _given(self) -> Mapping[str, TeacherTerm]:
        return self.teachers or {TEACHER.name: TeacherTerm(weight=1.0)}

    def _guidances(self, term: TeacherTerm) -> Guidances:
        own, own_low = term.guidance_scale, term.guidance_scale_2
        high, low = self.common_guidances if own is None else (own, None)
        given = next((w for w in (own_low, low) if w is not None), high)
        return high, given


def _never_used(w: float, who: str) -> str:
    return (
        f"{w:g} is the guidance of a second expert, for low noise levels, and would never be "
        f"used: {who} has one expert. Leave it out"
    )
