"""A table of clips: CSV, TSV, JSONL, JSON or parquet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from distill_protocols import DataError
from distill_runtime import UnreadableFileError, parse_json, path_inside, path_problem

from distill_media.config import SourceConfig
from distill_media.items import MediaItem, MediaPlace
from distill_media.sources.texts import MAX_TABLE, read_text

MEDIA_COLUMNS = ("video", "path", "file_name", "media", "file", "image", "video_path")
CAPTION_COLUMNS = ("prompt", "caption", "text", "captions")
START, END = "start", "end"
MAX_FIELD = 1 << 20
"""Characters of one field of a CSV file."""

Row = Mapping[str, object]


def items_of_table(file: Path, source: SourceConfig) -> Iterator[MediaItem]:
    """Yield the rows of a table in their order; the id is the path as the row writes it.

    Columns ``start`` and ``end``, in seconds, name the part of a clip that the row is about.
    Relative paths must stay below ``root``; an absolute one is what its writer meant.

    Raises:
        DataError: the table cannot be read, is empty, or lacks the columns.
    """
    columns, rows = _rows_of(file)
    media = _column(file, source.media, MEDIA_COLUMNS, columns, "the clip's path")
    captions = source.caption
    if not captions:
        captions = tuple(name for name in CAPTION_COLUMNS if name in columns)[:1]
    if missing := [name for name in captions if name not in columns]:
        raise _no_column(file, missing[0], columns, "captions")
    root = Path(source.root) if source.root is not None else file.parent
    count = 0
    for count, row in enumerate(rows, start=1):
        yield _item(row, count, media, captions, root, file)
    if not count:
        raise DataError(f"{file}: holds no row. A row names a clip and its caption")


def texts_of(value: object) -> tuple[str, ...]:
    """Return the captions in a field: a text, or a list of texts; without empty ones.

    Raises:
        ValueError: it is anything else.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    texts = [text.strip() for text in values if isinstance(text, str)]
    if len(texts) < len(values):
        raise ValueError(f"{str(value)[:60]!r} is neither a text nor a list of texts")
    return tuple(filter(None, texts))


def _item(
    row: Row, number: int, media: str, captions: tuple[str, ...], root: Path, file: Path
) -> MediaItem:
    written = row.get(media)
    name = written.strip() if isinstance(written, str) else ""
    if not name:
        problem = f"row {number} of {file.name} has no text in the column {media!r}"
        return MediaItem(id=f"{file.name}:{number}", problem=f"{problem}. Write the clip's path")
    try:
        path = _resolve(name, root, file)
        size = path.stat().st_size
        texts = tuple(text for column in captions for text in texts_of(row.get(column)))
        segment = _segment(row)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "unreadable"
        problem = f"{reason} (row {number} of {file.name}): {root / name}"
        return MediaItem(id=name, problem=problem)
    except (ValueError, UnreadableFileError) as error:
        return MediaItem(id=name, problem=f"row {number} of {file.name}: {error}")
    place = MediaPlace(path, name)
    return MediaItem(id=name, captions=texts, place=place, size=size, segment=segment)


def _resolve(name: str, root: Path, file: Path) -> Path:
    if not PurePosixPath(name).is_absolute():
        return path_inside(root, name.removeprefix("./"), file)
    if problem := path_problem(name):
        raise ValueError(problem)
    return Path(name)


def _segment(row: Row) -> tuple[float, float] | None:
    written = (row.get(START), row.get(END))
    if all(value in (None, "") for value in written):
        return None
    start, end = (
        default if value in (None, "") else float(str(value))
        for value, default in zip(written, (0.0, math.inf), strict=True)
    )
    if not 0 <= start < end:
        raise ValueError(f"start {start:g} and end {end:g} are seconds, the end after the start")
    return start, end


# -- files of rows --------------------------------------------------------------------------------


def _rows_of(file: Path) -> tuple[list[str], Iterable[Row]]:
    """Return the names of the columns, and the rows."""
    readers = {
        ".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows,
        ".parquet": _parquet_rows,
    }  # fmt: skip
    read = readers.get(file.suffix.lower())
    if read is None:
        raise DataError(
            f"{file}: {file.suffix or 'no suffix'} is no table that is read. Name a file that ends "
            f"in {', '.join(readers)}"
        )
    try:
        rows = read(file)
    except (UnreadableFileError, csv.Error, OSError) as error:
        raise DataError(f"{error}. It should be a table of clips and captions: {file}") from error
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, rows


def _csv_rows(file: Path) -> list[Row]:
    text = read_text(file, max_bytes=MAX_TABLE)
    csv.field_size_limit(MAX_FIELD)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    # Strict: a quote that is never closed would swallow the rest of the table as one field.
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [str(name).strip() for name in rows.fieldnames or []]
    if len(set(header)) < len(header):
        raise UnreadableFileError(f"{file} has two columns of one name: {', '.join(header)}")
    rows.fieldnames = header
    return [{key: value for key, value in row.items() if key is not None} for row in rows]


def _jsonl_rows(file: Path) -> list[Row]:
    lines = enumerate(read_text(file, max_bytes=MAX_TABLE).split("\n"), start=1)
    return [
        _as_row(parse_json(line, f"{file}, line {number}"), f"{file}, line {number}")
        for number, line in lines
        if line.strip()
    ]


def _json_rows(file: Path) -> list[Row]:
    value = parse_json(read_text(file, max_bytes=MAX_TABLE), str(file))
    if not isinstance(value, list):
        raise UnreadableFileError(f"{file} holds no list of objects")
    return [_as_row(row, f"{file}, entry {number}") for number, row in enumerate(value, start=1)]


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise UnreadableFileError(f"{where} is no object, {{column: value}}")
    return value


def _parquet_rows(file: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{file}: pyarrow, which reads parquet, is not installed. pip install "
            "'distill-media[parquet]', or save the table as JSONL"
        ) from error
    try:
        return parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UnreadableFileError(f"{file} is no parquet file ({str(error)[:200]})") from error


def _column(
    file: Path, name: str | None, defaults: tuple[str, ...], columns: list[str], what: str
) -> str:
    found = name or next((column for column in defaults if column in columns), None)
    if found is None or found not in columns:
        raise _no_column(file, found or " or ".join(defaults), columns, what)
    return found


def _no_column(file: Path, name: str, columns: list[str], what: str) -> DataError:
    return DataError(
        f"{file}: there is no column {name}, for {what}; it has {', '.join(columns) or 'none'}. "
        "Name the column that it is in (media, caption)"
    )
