"""WebDataset: tars whose members of one key are one sample. Nothing is extracted."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from attrs import define, field
from distill_protocols import DataError
from distill_runtime import UnreadableFileError, open_file, parse_json

from distill_media.config import SourceConfig
from distill_media.items import MEDIA_SUFFIXES, MediaItem, MediaPlace
from distill_media.sources.tables import CAPTION_COLUMNS, texts_of
from distill_media.sources.texts import MAX_CAPTION, decode_text, split_captions


def items_of_tars(path: Path, source: SourceConfig) -> Iterator[MediaItem]:
    """Yield the clips of a tar, or of all tars in a folder in the order of their names.

    A key is a member's name up to the first dot after its last slash, as WebDataset has it. An id
    is ``<tar>/<key>.<suffix>``; items are in the order of the tar, so that reading them goes
    through it from its beginning to its end.

    Raises:
        DataError: there is no tar, or one that is damaged or compressed.
    """
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not tars or not all(tar.is_file() for tar in tars):
        raise DataError(f"{path}: there is no .tar. Name one, or the folder that they are in")
    for tar in tars:
        yield from _items_of_tar(tar, source)


@define
class _Sample:
    """The members of one key."""

    captions: tuple[str, ...] = ()
    media: list[MediaPlace] = field(factory=list)
    problem: str | None = None


def _items_of_tar(tar: Path, source: SourceConfig) -> Iterator[MediaItem]:
    samples: dict[str, _Sample] = {}
    try:
        # "r:" reads plain tars alone: of a compressed one no member could be found again without
        # reading all before it.
        with open_file(tar) as content, tarfile.open(fileobj=content, mode="r:") as file:
            for member in file:
                if member.isfile():
                    _take_member(file, member, tar, samples, source)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{tar}: is no whole tar without compression ({error}). Copy it again, or unpack a "
            ".tar.gz to a .tar"
        ) from error
    for sample in samples.values():
        for place in sample.media:
            name = place.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            yield MediaItem(
                id=f"{tar.stem}/{name}",
                captions=sample.captions,
                place=place,
                size=place.size or 0,
                problem=sample.problem,
            )


def _take_member(
    file: tarfile.TarFile,
    member: tarfile.TarInfo,
    tar: Path,
    samples: dict[str, _Sample],
    source: SourceConfig,
) -> None:
    folder, slash, base = member.name.rpartition("/")
    stem, _, end = base.partition(".")
    sample = samples.setdefault(folder + slash + stem, _Sample())
    suffix = f".{end.lower()}"
    if suffix in MEDIA_SUFFIXES:
        place = MediaPlace(tar, member.name, offset=member.offset_data, size=member.size)
        sample.media.append(place)
        return
    if suffix not in (source.caption_suffix, ".json") or member.size > MAX_CAPTION:
        return
    stream = file.extractfile(member)
    assert stream is not None  # of a regular file
    try:
        text = decode_text(stream.read())
        if suffix == ".json":
            found = _captions_of_json(text, f"{tar}: {member.name}", source)
        else:
            found = split_captions(text, lines=source.caption_lines)
        # The text beside a clip counts before its metadata.
        if found and (suffix != ".json" or not sample.captions):
            sample.captions = found
    except (ValueError, UnreadableFileError) as error:
        sample.problem = f"its caption cannot be read ({member.name}): {error}"


def _captions_of_json(text: str, where: str, source: SourceConfig) -> tuple[str, ...]:
    value = parse_json(text, where)
    if not isinstance(value, dict):
        return ()
    keys = source.caption or tuple(key for key in CAPTION_COLUMNS if key in value)[:1]
    return tuple(caption for key in keys for caption in texts_of(value.get(key)))
