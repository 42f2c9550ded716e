"""Export when the run is complete."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill_protocols import (
    Callback,
    CapabilityError,
    Exporter,
    RoleError,
    RoleSpec,
    RunState,
    SamplerSpec,
    WeightSource,
)

from distill_checkpoint.config import ExportConfig
from distill_checkpoint.serving import ranks_that_save, served

logger = logging.getLogger(__name__)


class ExportCallback(Callback):
    """Writes roles where other tools read them, when all steps are done.

    A run that was asked to stop exports nothing: it is not finished, its checkpoint is what it
    goes on from, and who stops a run waits for it. An export that fails raises.

    On several ranks every one has this callback: rank 0 writes, and the others give it their parts
    of sharded weights, one tensor at a time. An error of one is an error of all.

    Args:
        exports: what to write (``checkpoint.export``).
        exporter: the family's.
        roles: where each role came from, by name.
        output_dir: ``ExportConfig.folder`` is relative to it.
        timeout: seconds after which a rank that does not answer is given up
            (``checkpoint.timeout_seconds``).
    """

    name = "export"

    def __init__(
        self,
        exports: Sequence[ExportConfig],
        exporter: Exporter,
        roles: Mapping[str, RoleSpec],
        output_dir: Path | str,
        *,
        timeout: float = 1800.0,
    ) -> None:
        self.exports = tuple(exports)
        self.exporter = exporter
        self.roles = dict(roles)
        self.output_dir = Path(output_dir)
        self.timeout = timeout
        self._checked = False

    def on_step_start(self, run: RunState) -> None:
        """Refuse now what could not be exported after days of training.

        In the first step rather than at ``on_train_start``: averages are made there.

        Raises:
            RoleError: a role to export, or its EMA, does not exist.
            CapabilityError: the method does not say how its student is sampled.
        """
        if self._checked:
            return
        for export in self.exports:
            _sampler_of(run)
            role = run.method.bundle[export.role]
            if export.ema and role.modules.keys() - role.ema.keys():
                raise RoleError(
                    f"checkpoint.export asks for the EMA weights of {export.role!r}, which keeps "
                    "none: there would be nothing to export at the end. Add the role under "
                    "callbacks.ema.roles, or set ema: false."
                )
        self._checked = True

    def on_train_end(self, run: RunState) -> None:
        """Export everything, or say why not."""
        if not self.exports:
            return
        if run.iteration < run.max_train_steps:
            if run.ranks.is_first:
                logger.warning(
                    "nothing exported: the run stopped at iteration %d of %d (%s). Resume it to "
                    "the end, which exports.",
                    run.iteration,
                    run.max_train_steps,
                    run.stop_reason or "no reason given",
                )
            return
        ranks = ranks_that_save(self.timeout)
        for export in self.exports:
            weights = run.method.bundle[export.role].weight_sources(ema=export.ema)
            served(ranks, weights, functools.partial(self._export, export, _sampler_of(run)))

    def _export(
        self, export: ExportConfig, sampler: SamplerSpec, weights: Mapping[str, WeightSource]
    ) -> None:
        folder = self.output_dir / export.folder
        role, request = self.roles[export.role], export.request(sampler)
        facts = self.exporter.export(role, weights, folder, request)
        logger.info(
            "exported %s (%s weights, %s) to %s",
            export.role,
            "EMA" if export.ema else "live",
            export.format,
            folder,
        )
        for note in facts["notes"]:
            logger.info("  note: %s", note)
        if export.verify:
            for note in self.exporter.verify(role, weights, folder, request)["notes"]:
                logger.info("  verified: %s", note)


def _sampler_of(run: RunState) -> SamplerSpec:
    spec = run.method.sampler_spec
    if spec is None:
        raise CapabilityError(
            f"{type(run.method).__name__} has no sampler_spec, and an export without one leaves "
            "its users to guess steps and shift. Give the method one, or take checkpoint.export "
            "out of the run file."
        )
    return spec
