"""Paths that stand in files and settings: may they be used? No torch here."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from distill_runtime.json_files import UnreadableFileError

MAX_NAME = 255
"""Bytes of one name; no common file system has longer ones."""
MAX_PATH = 4000
"""Bytes of a path; the system's own limit is 4096."""


def path_problem(path: str) -> str | None:
    """Say why no file system has ``path``; None where one may have it. Nothing is looked up."""
    if "\0" in path:
        return f"{path!a} holds a NUL character, which no file name can; take it out"
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return f"{path!a} holds half of a UTF-16 pair, which is no text; take it out"
    longest = max(map(len, encoded.split(b"/")))
    if longest > MAX_NAME or len(encoded) > MAX_PATH:
        return (
            f"{path[:40]!r} ... has {len(encoded)} bytes, a name in it {longest}; a path has at "
            f"most {MAX_PATH}, and a name {MAX_NAME}. Choose a shorter one"
        )
    if path.startswith("~"):
        try:
            Path(path).expanduser()
        except RuntimeError:
            return f"{path!r}: there is no such user, so no home folder; write the whole path"
    return None


def path_inside(folder: Path, name: object, where: object) -> Path:
    """``folder / name``, where ``name`` was read from the file ``where`` and must stay in
    ``folder``. Links are not followed: a Hugging Face cache is made of links.

    Raises:
        UnreadableFileError: no text, absolute, with ``..``, or a name that no file can have.
    """
    problem = None
    if not isinstance(name, str) or not name:
        problem = "is no file name"
    elif PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        problem = f"lies outside of {folder}, and a file may name only what lies beside it"
    elif path_problem(name) or name.startswith("~"):
        problem = "is no name that a file can have"
    if problem:
        raise UnreadableFileError(f"{where} names {name!a}, which {problem}")
    return folder / str(name)
