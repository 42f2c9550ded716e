"""Run files that follow each other: one starts from the weights that another makes. No torch.

A file says where its roles start (``models.<role>.init_from``) and where its results go
(``training.output_dir``), and that is enough to find the files before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import frozen
from distill_protocols import ConfigError

from distill_runfile.missing import find_writer
from distill_runfile.paths import resolve_path
from distill_runfile.schema import is_local
from distill_runfile.source import read_source


@frozen(kw_only=True)
class Stage:
    """One run of a chain.

    Attributes:
        file: its run file.
        starts: by role, the path that it starts from, of those that an earlier stage makes.
    """

    file: Path
    starts: Mapping[str, Path]


def find_chain(file: Path) -> tuple[Stage, ...]:
    """Find the runs that the one of ``file`` starts from, and those that they start from, in the
    order in which they must be run; ``file`` is the last.

    Candidates are the run files in its folder (``find_writer``). A start that none of them makes is
    none of the chain's: it must be there.

    Raises:
        ConfigError: the files go round in a circle.
    """
    stages: dict[Path, Stage] = {}
    _add_stage(file, stages, ())
    return tuple(stages.values())


def _add_stage(file: Path, stages: dict[Path, Stage], followers: tuple[Path, ...]) -> None:
    if file in followers:
        circle = " starts from ".join(one.name for one in (*followers, file))
        raise ConfigError(
            [
                f"{circle}: each waits for the other's result, so none can be the first. Change "
                "init_from or training.output_dir in one of them"
            ]
        )
    if file in stages:
        return
    made: dict[str, Path] = {}
    for role, path in _starts_of(file).items():
        writer = find_writer(path, file)
        if writer is None or writer.app != "train":
            continue
        # As the file's own folder is written, so that messages name files as the caller does.
        _add_stage(file.parent / writer.file.name, stages, (*followers, file))
        made[role] = Path(path)
    stages[file] = Stage(file=file, starts=made)


def _starts_of(file: Path) -> dict[str, str]:
    """Read by role the folder or file that it starts from; what is not right is left out, as the
    check of the file says so."""
    models = (read_source(file).values or {}).get("models")
    starts: dict[str, str] = {}
    for name, role in (models if isinstance(models, dict) else {}).items():
        start = role.get("init_from") if isinstance(role, dict) else None
        path = start.get("path") if isinstance(start, dict) else None
        if not isinstance(path, str) or not path.strip() or not is_local(path):
            continue
        try:
            starts[name] = resolve_path(path, file.parent)
        except ValueError:
            continue
    return starts
