"""The sections ``data`` and ``conditioning`` of a run file. No torch here."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols.validators import within


def _not_empty(instance: object, attribute: object, value: str | None) -> None:
    if value is not None and not value.strip():
        raise ValueError(f"{value!r} must name a folder; leave the key out for the default")


def _is_a_share(instance: object, attribute: object, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(
            f"{value:g} must be a share within 0 and 1: it is the chance that a sample's caption "
            "is replaced by the negative condition"
        )


@frozen(kw_only=True)
class DataConfig:
    """The data set of latents that a run is trained on.

    Attributes:
        path: folder of a latent data set (it holds index.json), as ``preprocess`` writes it.
        shuffle: a new order each epoch, a function of the run's seed and the epoch; false reads
            the samples as they are stored.
        verify: ``index`` compares names, sizes and headers of the shards with the index (fast);
            ``full`` also reads every shard and compares its SHA-256, which alone finds bytes that
            changed inside a tensor.
        workers: threads that read the next batches while a step computes; 0 reads each batch
            when it is asked for. The batches are the same ones. 1 or 2 do for a local disk; more
            where the shards lie on slow storage. Two batches per worker are kept ready.
        accept: entries of what computed the data set that may differ from the run's own parts
            (``text_encoder.precision``, or ``vae`` for all entries of the VAE), where it is known
            that the difference does no harm.
    """

    path: str = field(validator=_not_empty, metadata={"path": ()})
    shuffle: bool = True
    verify: Literal["index", "full"] = field(default="index", validator=in_(["index", "full"]))
    workers: int = field(
        default=0,
        validator=within(
            0, 64, "each worker is a thread that keeps two batches in memory; 2 are usually enough"
        ),
    )
    accept: tuple[str, ...] = field(default=())


@frozen(kw_only=True)
class ConditioningConfig:
    """The negative condition, and how often it replaces a caption.

    Attributes:
        negative_prompt: the unconditional side of guidance. Left out, the data set's own is used;
            "" is a prompt too (that of Diffusers), and not the same as leaving it out.
        dropout: share of samples whose condition is replaced by the negative one, drawn anew for
            each sample in each epoch. 0.1 is customary where guidance is to be learnt.
        cache: folder of encoded prompts; left out, ``cache`` in the run's output folder.
    """

    negative_prompt: str | None = None
    dropout: float = field(default=0.0, validator=_is_a_share)
    cache: str | None = field(default=None, validator=_not_empty, metadata={"path": ()})
