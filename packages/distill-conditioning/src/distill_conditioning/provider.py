"""Conditions of prompts, each encoded once; the negative one is ready before step 1."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import attrs
import torch
from distill_protocols import (
    Condition,
    ConditionEncoder,
    ConditioningError,
    DataError,
    Fingerprint,
    ImageConditioning,
)
from distill_runtime import ALONE, Ranks
from safetensors.torch import save
from torch import Tensor, distributed

from distill_conditioning.config import ConditioningConfig
from distill_conditioning.fingerprints import compare_fingerprints, without_whole_encoder
from distill_conditioning.reading import LatentDataset, map_tensors
from distill_conditioning.writing import write_tensors

_log = logging.getLogger(__name__)


class PromptEncoder(ConditionEncoder, Protocol):
    """What the provider needs of an adapter."""

    @property
    def images(self) -> ImageConditioning | None:
        """Used only where prompts come with images."""
        ...


class CachedConditioning:
    """A ``ConditioningProvider``: data set's constants, else the cache, else the encoder.

    The encoder is called only for what is neither stored nor cached, so a second run loads no
    text encoder at all. With an empty fingerprint (the encoder is not on this machine) stored
    conditions are trusted, and encoded ones are kept in memory only.

    Of several ranks the first one alone uses data set, cache and encoder (a text encoder of 11 to
    23 GB is in the memory of one process), and sends the others the conditions. So all of
    them ask for the same prompts at the same points; each keeps what was asked for once, and
    may ask for it again whenever it likes.

    Args:
        config: the run's negative prompt, and the cache's folder.
        encoder: the adapter.
        dataset: whose constants may hold the negative condition.
        output_dir: ``cache`` in it is the cache's folder where the config names none; None: then
            encoded prompts are kept in memory alone.
        device: where the conditions are wanted.
        ranks: the processes of the run.

    Raises:
        ConditioningError: the data set's captions were encoded by other parts, and not all of that
            is accepted (``DataConfig.accept``). This and all
            other errors of one rank are errors of all.
    """

    def __init__(
        self,
        config: ConditioningConfig,
        *,
        encoder: PromptEncoder,
        dataset: LatentDataset | None = None,
        output_dir: str | Path | None,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._dataset = dataset
        self._device = torch.device(device)
        self._ranks = attrs.evolve(ranks, error=ConditioningError)
        self._rows: dict[str, Condition] = {}
        folder = None if output_dir is None else Path(output_dir) / "cache"
        self._cache = ConditionCache(folder if config.cache is None else Path(config.cache))
        self._negative: Condition | None = None
        self._negatives: Condition | None = None
        if dataset is not None:
            self._ranks.run_on_first(lambda: self._compare_encoders(dataset))

    def negative(self) -> Condition:
        """Return the negative condition, one row, fp32.

        Raises:
            ConditioningError: there is none.
        """
        if self._negative is None:
            [row] = self._get_from_first("the negative condition", lambda: [self._find_negative()])
            self._negative = row.to(self._device)
        return self._negative

    def negatives(self) -> Condition:
        """Return the negative condition and the further ones, one row each, fp32.

        Raises:
            ConditioningError: there is none.
        """
        more = self._config.more_negative_prompts
        if self._negatives is None:
            rows = [self.negative()]
            if more:
                found = self._get_from_first(
                    f"negative conditions of {more}", lambda: [*map(self._find_prompt, more)]
                )
                rows += [row.to(self._device) for row in found]
            self._negatives = Condition.cat(rows)
        return self._negatives

    def encode(
        self,
        prompts: Sequence[str],
        images: Tensor | None = None,
        last_images: Tensor | None = None,
    ) -> Condition:
        """Return the conditions of ``prompts``, one row each in their order, fp32.

        Args:
            images: first frames [B, 3, H_px, W_px] in [0, 1], or several of each clip, [B, 3, K,
                H_px, W_px]; encoded whenever they are given.
            last_images: last frames [B, 3, H_px, W_px], beside first ones.

        Raises:
            ConditioningError: there are no prompts, ranks ask for different ones, or the models
                take no images, not these ones or none of this size.
        """
        if not prompts:
            raise ConditioningError("no prompt to encode; give at least one")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if new:
            what = f"conditions of {new}"
            rows = self._get_from_first(what, lambda: self._encode_texts(new))
            self._rows.update(zip(new, rows, strict=True))
        texts = Condition.cat([self._rows[prompt] for prompt in prompts])
        if images is None:
            return texts.to(self._device)
        what = f"images of {list(prompts)}"
        [cond] = self._get_from_first(what, lambda: [self._add_images(texts, images, last_images)])
        return cond.to(self._device)

    def _add_images(self, texts: Condition, images: Tensor, last: Tensor | None) -> Condition:
        if self._encoder.images is None:
            raise ConditioningError(
                "there is a first frame, but this family reads text alone; it would have no "
                "effect. Leave it out, or use an image-to-video model"
            )
        if last is None:
            return self._encoder.images.with_image(texts, images).to("cpu")
        return self._encoder.images.with_image(texts, images, last=last).to("cpu")

    def _encode_texts(self, prompts: Sequence[str]) -> list[Condition]:
        return self._cache.rows(
            prompts, "prompt", self._fingerprint, self._encoder.encode_condition
        )

    def _get_from_first(self, what: str, find: Callable[[], list[Condition]]) -> list[Condition]:
        """Let rank 0 call ``find``, and return its rows on every rank, on the CPU."""
        ranks = self._ranks
        others = ranks.ranks_that_differ(what)
        if others:
            raise ConditioningError(
                f"rank {', '.join(map(str, others))} and rank 0 ask for different things (here: "
                f"{what[:200]}); rank 0 encodes for all, so all must ask for the same. Ask for all "
                "prompts on every rank, and leave out rows afterwards."
            )
        rows: list[Condition] = []

        def find_and_describe() -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
            rows.extend(find())
            return [{n: (t.shape, t.dtype) for n, t in row.tensors.items()} for row in rows]

        # Shapes go first, as objects: a broadcast writes into memory that the receiver has made.
        shapes = ranks.run_on_first(find_and_describe)
        if not rows:
            rows = [
                Condition({n: torch.empty(size, dtype=kind) for n, (size, kind) in row.items()})
                for row in shapes
            ]
        if ranks.group is not None:
            with ranks.within_timeout():
                # One order on all ranks, that of ``shapes``: a broadcast is known by nothing else.
                for tensor in (t for row in rows for t in row.tensors.values()):
                    distributed.broadcast(tensor.contiguous(), src=0, group=ranks.group)
        return rows

    def _find_negative(self) -> Condition:
        prompt = self._config.negative_prompt
        if prompt is not None:
            return self._find_prompt(prompt)
        stored = self._dataset.negative() if self._dataset is not None else None
        if stored is None:
            raise ConditioningError(
                "there is no negative condition: no negative prompt is given, and the data set "
                "holds no constants. Guidance and condition dropout need one. Set "
                'ConditioningConfig.negative_prompt ("" is a prompt too), or preprocess the data '
                "set with one."
            )
        return stored.condition

    def _find_prompt(self, prompt: str) -> Condition:
        """Take the condition of a negative prompt from the data set, the cache or the encoder."""
        stored = self._dataset.negative(prompt) if self._dataset is not None else None
        if stored is not None:
            return stored.condition
        [row] = self._cache.rows([prompt], "negative", self._fingerprint, self._encode_negative)
        return row

    @functools.cached_property
    def _fingerprint(self) -> Fingerprint:
        # Computed once: it reads files, and a download in between must not change the cache's keys.
        fingerprint = self._encoder.condition_fingerprint()
        if not fingerprint:
            _log.info(
                "no text encoder on this machine that could be compared: stored embeddings are "
                "taken to be those of the run's model, and encoded prompts are not kept on disk"
            )
        return fingerprint

    def _encode_negative(self, prompts: Sequence[str]) -> Condition:
        [prompt] = prompts
        return self._encoder.encode_neg_condition(prompt)

    def _compare_encoders(self, dataset: LatentDataset) -> None:
        problems: list[str] = []
        for source in dataset.sources:
            compared = compare_fingerprints(
                source.index.computed_by, self._fingerprint, dataset.config.accept
            )
            if compared.differences:
                problems += compared.problems(str(source.path))
        if problems:
            raise ConditioningError("\n".join(problems))


class ConditionCache:
    """Encoded prompts in memory and in a folder, one safetensors file each.

    A file is named by the hash of (kind, prompt, fingerprint) and repeats all three inside, with a
    hash of its tensors; one that does not agree with its name is encoded again, with a warning.
    Without a fingerprint nothing is kept on disk: no run could know later which encoder it was; nor
    without a folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, Condition] = {}

    def rows(
        self,
        prompts: Sequence[str],
        kind: str,
        fingerprint: Fingerprint,
        encode: Callable[[Sequence[str]], Condition],
    ) -> list[Condition]:
        """Return one row for each prompt, on the CPU in fp32; ``encode`` gets those that are not
        cached, all at once."""
        encoder = _hash_entries(fingerprint)
        origins = {p: {"kind": kind, "prompt": p, "encoder": encoder} for p in prompts}
        keys = {
            prompt: hashlib.sha256(repr(sorted(origin.items())).encode()).hexdigest()[:32]
            for prompt, origin in origins.items()
        }
        folder = self.folder if fingerprint else None
        for prompt, key in keys.items():
            if key not in self._memory and folder is not None:
                self._read(_file(folder, key), key, origins[prompt])
        missing = [prompt for prompt, key in keys.items() if key not in self._memory]
        if missing:
            encoded = encode(missing).to("cpu")
            if len(encoded) != len(missing):
                raise ConditioningError(
                    f"the encoder returned {len(encoded)} rows for {len(missing)} prompts; it must "
                    "return one each, or prompts and conditions would be mixed up. This is an "
                    "error of the adapter."
                )
            for number, prompt in enumerate(missing):
                row = Condition(
                    {
                        name: (value.float() if value.is_floating_point() else value).clone()
                        for name, value in encoded[number : number + 1].tensors.items()
                    }
                )
                self._memory[keys[prompt]] = row
                if folder is not None:
                    self._write(_file(folder, keys[prompt]), row, origins[prompt])
        return [self._memory[keys[prompt]] for prompt in prompts]

    def _read(self, file: Path, key: str, origin: dict[str, str]) -> None:
        if not file.exists():
            return
        if not file.is_file():
            raise ConditioningError(
                f"{file} is no file, and an encoded prompt is kept under that name. Move it away"
            )
        try:
            tensors, metadata = map_tensors(file)
            condition = Condition(tensors)
        except DataError as error:
            _log.warning("%s: encoding the prompt again", error)
            return
        if metadata != {**origin, "sha256": _hash_tensors(condition)}:
            _log.warning(
                "%s: does not hold what its name stands for (prompt, encoder or content changed); "
                "encoding the prompt again",
                file,
            )
            return
        self._memory[key] = condition

    def _write(self, file: Path, row: Condition, origin: dict[str, str]) -> None:
        write_tensors(file, row.tensors, {**origin, "sha256": _hash_tensors(row)})


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _hash_entries(fingerprint: Fingerprint) -> str:
    entries = sorted(without_whole_encoder(fingerprint).items())
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:32]


def _hash_tensors(condition: Condition) -> str:
    return hashlib.sha256(save(dict(condition.tensors))).hexdigest()
