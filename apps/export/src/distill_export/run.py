"""The export itself: from a checkpoint's files to the family's exporter, no module built."""

from __future__ import annotations

import time
from pathlib import Path

from distill_checkpoint import StoredCheckpoint
from distill_protocols import ExportRequest, RoleSpec
from distill_runfile import ModelsConfig, cli
from distill_runtime import readable_bytes


def export(
    checkpoint: Path,
    role: RoleSpec,
    folder: Path,
    request: ExportRequest,
    *,
    models: ModelsConfig,
    verify: bool,
) -> None:
    """Write ``role`` of ``checkpoint`` to ``folder``, and say what was done.

    Raises:
        DistillError: the checkpoint is damaged, keys do not match, the folder cannot be written,
            or the result does not read back alike.
    """
    stored = StoredCheckpoint.open(checkpoint)
    weights = stored.weights(role.name, ema=request.weights == "ema")
    exporter = models.family_plugin.exporter(models.pipeline, source=models.source)
    began = time.perf_counter()  # importing the family's libraries took its time before
    record = exporter.export(role, weights, folder, request)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    cli.say(
        f"{role.name} ({request.weights} weights, iteration {stored.iteration:,}) as "
        f"{request.format}: {folder}, {readable_bytes(size)} in {time.perf_counter() - began:.1f} s"
    )
    for note in record["notes"]:
        cli.say(f"  note: {note}")
    if verify:
        for note in exporter.verify(role, weights, folder, request)["notes"]:
            cli.say(f"  verified: {note}")
