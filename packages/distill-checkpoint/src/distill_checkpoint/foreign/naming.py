"""Another framework's names into ours, strictly: each name has an image, no two have the same."""

from __future__ import annotations

from collections.abc import Sequence

from distill_protocols import CheckpointError, ForeignNames, WeightSource

from distill_checkpoint.foreign.sources import Renamed


def renamed(source: WeightSource, names: ForeignNames) -> WeightSource:
    """``source`` under our names.

    Raises:
        CheckpointError: names that are unknown, that have one image, or that are missing.
    """
    theirs = [name for name in source.describe() if not names.unused(name)]
    images: dict[str, str] = {}
    unknown = []
    for name in theirs:
        image = names.ours(name)
        if image is None:
            unknown.append(name)
        elif image in images:
            raise CheckpointError(
                f"{source.where}: {images[image]} and {name} are both our {image}; one of them "
                "would be lost. Save one model alone into the file"
            )
        else:
            images[image] = name
    if unknown:
        raise CheckpointError(
            f"{source.where}: {some(unknown)} ({len(unknown)} of {len(theirs)} names) belong to no "
            "weight of this family. All must, because a weight left out is noticed by nobody. It "
            "is a variant with layers that the family's model does not have (LoRA, "
            "sparse-attention gates, a second timestep ...), or of another family: merge the one "
            "there, or name the other"
        )
    missing = names.missing(images)
    if missing:
        raise CheckpointError(
            f"{source.where}: {some(missing)} ({len(missing)} names) are missing, and a module "
            "without them cannot be built. Only what is trained is in such a checkpoint, so name "
            "the folder of the whole transformer (*_inference_transformer/, transformer/)"
        )
    return Renamed(source, images)


def some(names: Sequence[str], most: int = 6) -> str:
    """The first of them, and that there are more."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
