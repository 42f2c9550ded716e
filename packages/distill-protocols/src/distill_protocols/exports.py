"""What an export is, and who writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

from attrs import frozen

from distill_protocols.roles import Precision, RoleSpec
from distill_protocols.sampler import SamplerSpec

if TYPE_CHECKING:
    from pathlib import Path

    from distill_protocols.weights import WeightSource


@frozen(kw_only=True)
class ExportRequest:
    """What an export shall be.

    Attributes:
        sampler: how the role is sampled; it is written beside the weights.
        weights: which weights of the role these are, for the record.
        format: one of ``FamilyPlugin.export_formats``, which states what each of them is.
        precision: of the written weights; None: as they are stored.
        lora_rank: for low-rank adapters of a role that has none: the rank of the difference to
            its base, taken by singular value decomposition.
        max_shard_bytes: largest weight file of a pipeline folder.
    """

    sampler: SamplerSpec
    weights: Literal["live", "ema"] = "live"
    format: str = "diffusers"
    precision: Precision | None = None
    lora_rank: int | None = None
    max_shard_bytes: int = 5 * 1000**3


class ExportRecord(TypedDict):
    """The record of an export or a verification; an exporter adds entries of its own.

    Attributes:
        notes: lines that a person should read.
    """

    notes: Sequence[str]


class Exporter(Protocol):
    """Writes one role where other tools can read it."""

    def export(
        self,
        role: RoleSpec,
        weights: Mapping[str, WeightSource],
        folder: Path,
        request: ExportRequest,
    ) -> ExportRecord:
        """Write ``folder`` whole or not at all, tensor by tensor.

        Returns a record of the export.

        Args:
            role: where it came from: its path describes how it is built, and is the base of a LoRA.
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
    ) -> ExportRecord:
        """Read ``folder`` with the reader that it is for, and compare with ``weights``.

        Returns what was compared, which the notes say.

        Raises:
            WeightsError: a key is unmatched, or an output differs from that of ``weights``.
        """
        ...


SPEC_FILE = "sampler_spec.json"
"""Beside the weights in every format; an older export is recognised by it."""


@frozen(kw_only=True)
class ForeignNames:
    """What a family knows of the names that its weights have in other codes.

    Attributes:
        ours: their name -> ours; None for a name that it does not know.
        unused: whether a name, though not one of ours, is of a weight that has no effect.
        missing: of all our names of one module, those that it lacks to be whole.
    """

    ours: Callable[[str], str | None]
    unused: Callable[[str], bool] = lambda name: False
    missing: Callable[[Iterable[str]], Sequence[str]] = lambda names: ()
