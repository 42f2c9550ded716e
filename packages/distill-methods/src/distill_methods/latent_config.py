"""What the configs of all methods of this package have. No torch here."""

from __future__ import annotations

from attrs import field, frozen
from distill_protocols import MethodConfig, SamplerSpec


@frozen(kw_only=True, slots=False)  # so that a config may have a second base
class LatentMethodConfig(MethodConfig):
    """A method whose student can be sampled.

    Attributes:
        student_sampler: how the student is sampled in validation and export.
    """

    student_sampler: SamplerSpec = field()
