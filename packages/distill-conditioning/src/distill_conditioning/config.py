"""The sections ``data`` and ``conditioning`` of a run file. No torch here."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols.validators import within


def _not_empty(instance: object, attribute: object, value: str | None) -> None:
    if value is not None and not value.strip():
        raise ValueError(f"{value!r} must name a folder; leave the key out for the default")


def _is_a_share(instance: object, attribute: object, value: float | dict[str, float]) -> None:
    for rate in value.values() if isinstance(value, dict) else (value,):
        if not 0 <= rate <= 1:
            raise ValueError(
                f"{rate:g} must be a share within 0 and 1: it is the chance that a sample's "
                "caption is replaced by the negative condition"
            )


@frozen(kw_only=True)
class DataSetConfig:
    """One of several data sets that a run is trained on.

    Attributes:
        path: folder of a latent data set.
        weight: its share of all samples, relative to the weights of the others; left out in all of
            them, each counts by its size.
        name: begins the ids of its samples, ``name/id``; left out, the name of its folder.
    """

    path: str = field(validator=_not_empty, metadata={"path": ()})
    weight: float | None = field(default=None)
    name: str | None = field(default=None, validator=_not_empty)

    @weight.validator
    def _check_weight(self, attribute: object, value: float | None) -> None:
        if value is not None and not 0 < value < math.inf:
            raise ValueError(
                f"{value:g} must be a number above 0: a data set without a share of the samples is "
                "none of the run's. Leave the data set out"
            )


@frozen(kw_only=True)
class DataConfig:
    """The data set of latents that a run is trained on, or several.

    Attributes:
        path: folder of a latent data set (it holds index.json), as ``preprocess`` writes it.
        sets: instead of ``path``, several data sets that are mixed.
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

    path: str | None = field(default=None, metadata={"path": ()})
    sets: tuple[DataSetConfig, ...] = field(default=())
    shuffle: bool = True
    verify: Literal["index", "full"] = field(default="index", validator=in_(["index", "full"]))
    workers: int = field(
        default=0,
        validator=within(
            0, 64, "each worker is a thread that keeps two batches in memory; 2 are usually enough"
        ),
    )
    accept: tuple[str, ...] = field(default=())

    @path.validator
    def _check_path(self, attribute: object, value: str | None) -> None:
        if value is None and not self.sets:
            raise ValueError("missing; name the folder of a data set, or several under sets")
        if value is not None and self.sets:
            raise ValueError(f"{value!r} beside sets; write it as one of them")
        _not_empty(self, attribute, value)

    @sets.validator
    def _check_sets(self, attribute: object, value: tuple[DataSetConfig, ...]) -> None:
        names = self.names
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(
                f"{', '.join(doubled)}: two data sets have this name, and the ids of their samples "
                "begin with it. Give each a name of its own"
            )
        if len({one.weight is None for one in value}) > 1:
            raise ValueError(
                "some have a weight and some have none; a weight is no number of samples. Give "
                "all of them one, or none"
            )

    @property
    def all_sets(self) -> tuple[DataSetConfig, ...]:
        """The data sets, one or several."""
        return self.sets if self.path is None else (DataSetConfig(path=self.path),)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the data sets."""
        return tuple(one.name or PurePath(one.path).name for one in self.all_sets)


@frozen(kw_only=True)
class ConditioningConfig:
    """The negative condition, and how often it replaces a caption.

    Attributes:
        negative_prompt: the unconditional side of guidance. Left out, the data set's own is used;
            "" is a prompt too (that of Diffusers), and not the same as leaving it out.
        more_negative_prompts: further ones. Training draws one of all of them for each sample, each
            as often, where a teacher is guided and where a caption is dropped; samplers take
            ``negative_prompt``.
        dropout: share of samples whose condition is replaced by the negative one, drawn anew for
            each sample in each epoch. 0.1 is customary where guidance is to be learnt. Or a share
            by name of a condition tensor, ``{text: 0.1, image_embeds: 0.1}``, each drawn by itself;
            a tensor that the negative condition does not hold is replaced by zeros.
        cache: folder of encoded prompts; left out, ``cache`` in the run's output folder.
    """

    negative_prompt: str | None = None
    more_negative_prompts: tuple[str, ...] = field(default=())
    dropout: float | dict[str, float] = field(default=0.0, validator=_is_a_share)
    cache: str | None = field(default=None, validator=_not_empty, metadata={"path": ()})

    @more_negative_prompts.validator
    def _check_more(self, attribute: object, value: tuple[str, ...]) -> None:
        if value and self.negative_prompt is None:
            raise ValueError(
                f"{len(value)} beside no negative_prompt, which samplers take: a clip is sampled "
                "by one. Write one of them there"
            )
        prompts = [self.negative_prompt, *value]
        if doubled := sorted({str(text) for text in prompts if prompts.count(text) > 1}):
            raise ValueError(
                f"{', '.join(map(repr, doubled))}: stands there twice; each is drawn as often. "
                "Write it once"
            )

    @property
    def drops(self) -> bool:
        """Whether any condition is replaced."""
        rates = self.dropout.values() if isinstance(self.dropout, dict) else (self.dropout,)
        return any(rate > 0 for rate in rates)
