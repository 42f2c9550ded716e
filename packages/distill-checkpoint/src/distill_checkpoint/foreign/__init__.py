"""Turn a checkpoint of another framework into one of ours, without unpickling."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen
from distill_protocols import ForeignNames, OutputError
from distill_runtime import readable_bytes

from distill_checkpoint.foreign.layouts import ForeignCheckpoint, describe_checkpoint
from distill_checkpoint.weights import write_weights_checkpoint

logger = logging.getLogger(__name__)


@frozen(kw_only=True)
class MigrationReport:
    """What a migration has done.

    Attributes:
        layout: what the source was, to be read after "it is".
        iteration: how far it had come.
        taken: a line for each module and average that is in the new checkpoint.
        left: a line for each thing that is not, with the reason.
    """

    layout: str
    iteration: int
    taken: tuple[str, ...]
    left: tuple[str, ...]


def migrate(
    source: Path | str,
    target: Path | str,
    *,
    names: ForeignNames,
    ema: bool = True,
    moments: bool = False,
) -> MigrationReport:
    """Turn a checkpoint of FastVideo or an initial student of Self-Forcing into one of ours.

    The result holds weights, and averages where there are any: it can be taken up as another run's
    beginning and exported, but not resumed, as optimizers, loader and random state are the other
    framework's own. Weights keep their dtype, and are read file by file as they are written.

    Args:
        source: a checkpoint's folder, or a ``.pt`` file; see ``layouts``.
        target: the new checkpoint's folder; must not exist.
        names: what the family's weights are called there (``FamilyPlugin.foreign_names``).
        ema: False leaves averages out.
        moments: True keeps the optimizers' moments in it, for whoever wants to look at them: no run
            takes them up, and they are twice as large as the weights.

    Raises:
        CheckpointError: the source is none of the layouts, is damaged, would run code, holds a
            name that the family does not know or lacks one; nothing is written.
        OutputError: the target is there already.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise OutputError(
            f"{target} exists already, and a migration overwrites nothing. Name a new folder, or "
            "move that one away"
        )
    checkpoint = describe_checkpoint(source, names, ema=ema)
    roles = {(role.role, role.module): role for role in checkpoint.roles}
    kept_moments = {key: role.moments for key, role in roles.items() if role.moments is not None}
    write_weights_checkpoint(
        target,
        iteration=checkpoint.iteration,
        roles={key: role.weights for key, role in roles.items()},
        ema={key: role.ema for key, role in roles.items() if role.ema is not None},
        moments=kept_moments if moments else None,
        config={"layout": checkpoint.layout, "source": str(source), "config": checkpoint.config},
        origin=f"{source} ({checkpoint.layout})",
    )
    moments_left = [
        f"{role}.{module}: optimizer moments (no run can go on from them)"
        for role, module in ([] if moments else kept_moments)
    ]
    report = MigrationReport(
        layout=checkpoint.layout,
        iteration=checkpoint.iteration,
        taken=tuple(_taken(checkpoint, moments)),
        left=(*moments_left, *checkpoint.left),
    )
    for line in report.taken:
        logger.info("taken: %s", line)
    for line in report.left:
        logger.info("left: %s", line)
    return report


def _taken(checkpoint: ForeignCheckpoint, moments: bool) -> Iterator[str]:
    for role in checkpoint.roles:
        kinds = {"weights": role.weights, "average": role.ema}
        if moments:
            kinds["optimizer moments"] = role.moments
        for kind, source in kinds.items():
            if source is not None:
                infos = source.describe().values()
                size = readable_bytes(sum(info.nbytes for info in infos))
                yield (
                    f"{role.role}.{role.module}: {kind}, {len(infos)} tensors, {size}, "
                    f"from {source.where}"
                )
