"""A run's output folder, read for its page. Every file may be missing, half-written or hostile."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from attrs import define, field, frozen
from distill_runtime import (
    UnreadableFileError,
    as_count,
    as_text,
    flatten,
    parse_json,
    read_bytes,
    read_json_object,
)

from distill_evaluation.page.series import MetricsReader

RECORD_FILE = "run_record.json"
ALARM_FILE = "health.jsonl"
REPORT_FILE = "report.json"
MARKER_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
FOLDERS_READ = (MARKER_FILE, RECORD_FILE, METRICS_FILE, REPORT_FILE, "validation")
"""What a folder has at least one of, if a run has been in it."""

MOST_BYTES = 32 << 20
"""Of a JSON file; a report has some kilobytes."""
MOST_ALARMS = 500
MOST_ENTRIES = 200
MOST_METRICS = 60
MOST_SETTINGS = 5000
ALIVE_SECONDS = 1800.0
"""A run whose newest number is older, and whose end is not recorded, has ended all the same."""

State = Literal["finished", "running", "stopped", "unknown"]
ValueT = TypeVar("ValueT")


@frozen(kw_only=True)
class AlarmLine:
    """A line of ``health.jsonl``."""

    iteration: int
    rule: str
    action: str
    message: str
    value: float | None
    threshold: float | None


@frozen(kw_only=True)
class Measure:
    """A column of the table of quality.

    Attributes:
        better: ``lower``, ``higher``, ``near_1``, or None where neither is.
    """

    help: str
    better: str | None


@frozen(kw_only=True)
class Entry:
    """A row of the table of quality.

    Attributes:
        weights: ``live`` or ``ema``.
        sampler: how it sampled, in a few words.
        calls: model calls a clip.
        seconds: of sampling a clip.
    """

    name: str
    weights: str
    sampler: str
    calls: int | None
    seconds: float | None
    metrics: Mapping[str, float]


@frozen(kw_only=True)
class Report:
    """``report.json``.

    Attributes:
        clips: as the file has it, to be read by ``clips``.
    """

    iteration: int | None
    entries: tuple[Entry, ...]
    measures: Mapping[str, Measure]
    clips: object = None


@define(eq=False, kw_only=True)
class RunFolder:
    """What is known of a run.

    Attributes:
        settings: every key of the run file, dotted, with its value as JSON.
        run_file: its name and its text; None: unknown.
        starts: as ``run_record.json`` lists them.
        alarms: None where the run was not watched.
        problems: what could not be read, for the page.
    """

    folder: Path
    name: str
    metrics: MetricsReader
    settings: Mapping[str, str] = field(factory=dict)
    run_file: tuple[str, str] | None = None
    environment: Mapping[str, object] = field(factory=dict)
    starts: Sequence[Mapping[str, object]] = ()
    alarms: tuple[AlarmLine, ...] | None = None
    report: Report | None = None
    finished: int | None = None
    state: State = "unknown"
    end: str | None = None
    """Why it was stopped."""
    problems: list[str] = field(factory=list)

    @property
    def iteration(self) -> int | None:
        """The last one that is known of."""
        known = [n for n in (self.finished, *self.metrics.times.iterations[-1:]) if n is not None]
        return max(known, default=None)

    def setting(self, key: str) -> str | None:
        """A value of the run file as text, without quotes."""
        value = self.settings.get(key)
        with contextlib.suppress(ValueError, TypeError):
            plain = json.loads(value) if value is not None else None
            return plain if isinstance(plain, str) else value
        return value

    def number(self, key: str) -> float | None:
        """A number of the run file."""
        try:
            value = float(self.settings.get(key, ""))
        except ValueError:
            return None
        return value if math.isfinite(value) else None


def read_run(folder: Path, *, metrics: MetricsReader | None = None) -> RunFolder:
    """Read what a run has written so far.

    Args:
        metrics: a reader of an earlier call, which reads only what is new.
    """
    folder = Path(folder)
    metrics = metrics or MetricsReader(folder / METRICS_FILE)
    metrics.update()
    run = RunFolder(folder=folder, name=folder.resolve().name or str(folder), metrics=metrics)
    if metrics.skipped:
        run.problems.append(f"{METRICS_FILE}: {metrics.skipped:,} lines or names were left out")
    _read_record(run)
    run.alarms = _read_alarms(run)
    run.report = _or_problem(run, REPORT_FILE, _read_report)
    marker = _or_problem(run, MARKER_FILE, lambda content: content) or {}
    with contextlib.suppress(ValueError):
        run.finished = as_count(marker.get("finished"))
    run.state = _state_of(run)
    stop = run.starts[-1].get("stop_reason") if run.starts else None
    run.end = str(stop) if stop else None
    return run


def is_run_folder(folder: Path) -> bool:
    """Return whether a run has been in ``folder``."""
    return any((folder / name).exists() for name in FOLDERS_READ) or bool(_checkpoints(folder))


def _or_problem(
    run: RunFolder, name: str, read: Callable[[dict[str, object]], ValueT]
) -> ValueT | None:
    """Read a JSON object, if the file is there; what is wrong with it is a problem of the page."""
    path = run.folder / name
    if not path.exists():
        return None
    try:
        return read(read_json_object(path, max_bytes=MOST_BYTES))
    except (UnreadableFileError, ValueError, TypeError, KeyError, AttributeError) as error:
        run.problems.append(f"{name} cannot be read: {error}")
        return None


# -- what was run ---------------------------------------------------------------------------------


def _read_record(run: RunFolder) -> None:
    def read(content: dict[str, object]) -> None:
        run.settings = _flat(content.get("settings"))
        environment, starts = content.get("environment"), content.get("starts")
        run.environment = environment if isinstance(environment, dict) else {}
        run.starts = [s for s in starts if isinstance(s, dict)] if isinstance(starts, list) else []
        file = content.get("run_file")
        if isinstance(file, dict):
            run.run_file = (as_text(file.get("name")), as_text(file.get("text")))

    _or_problem(run, RECORD_FILE, read)
    if run.settings:
        return
    # Runs of earlier releases: every checkpoint holds the settings.
    for checkpoint in reversed(_checkpoints(run.folder)):
        name = f"{checkpoint.name}/config.json"
        run.settings = _or_problem(run, name, _flat) or {}
        if run.settings:
            return


def _checkpoints(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if re.fullmatch(r"checkpoint-\d{6,12}", p.name))
    except OSError:
        return []


def _flat(value: object) -> dict[str, str]:
    """Return settings as dotted keys, with values as JSON."""
    if not isinstance(value, dict):
        return {}
    flat = flatten(value, most=MOST_SETTINGS)
    return {key: json.dumps(setting, ensure_ascii=False) for key, setting in flat.items()}


def _state_of(run: RunFolder) -> State:
    if run.finished is not None:
        return "finished"
    newest = run.starts[-1] if run.starts else {}
    if newest.get("stop_reason"):
        return "stopped"
    if run.metrics.times and time.time() - run.metrics.times.values[-1] < ALIVE_SECONDS:
        return "running"
    return "unknown"


# -- alarms ---------------------------------------------------------------------------------------


def _read_alarms(run: RunFolder) -> tuple[AlarmLine, ...] | None:
    path = run.folder / ALARM_FILE
    if not path.exists():
        watched = any(name.startswith("health/") for name in run.metrics.series)
        return () if watched else None
    alarms, bad = [], 0
    try:
        content = read_bytes(path, max_bytes=MOST_BYTES)
    except UnreadableFileError as error:
        run.problems.append(f"{ALARM_FILE} cannot be read: {error}")
        return None
    lines = content.splitlines()
    if lines and not content.endswith(b"\n"):
        lines.pop()  # it is being written, or was when the run was killed
    for line in lines:
        try:
            alarms.append(_alarm(parse_json(line, "a line")))
        except (UnreadableFileError, ValueError, AttributeError):
            bad += 1
    if bad:
        run.problems.append(f"{ALARM_FILE}: {bad:,} lines were left out, as they are no alarms")
    if len(alarms) > MOST_ALARMS:
        run.problems.append(
            f"{ALARM_FILE}: of {len(alarms):,} alarms the last {MOST_ALARMS} are shown"
        )
    return tuple(alarms[-MOST_ALARMS:])


def _alarm(line: Mapping[str, object]) -> AlarmLine:
    return AlarmLine(
        iteration=as_count(line.get("iteration")),
        rule=as_text(line.get("rule")),
        action=as_text(line.get("action")),
        message=as_text(line.get("message")),
        value=_number(line.get("value")),
        threshold=_number(line.get("threshold")),
    )


# -- quality --------------------------------------------------------------------------------------

_OLD_MEASURES = {
    "fd": Measure(help="Frechet distance to real clips in the judge's features", better="lower"),
    "pixels": Measure(help="Frechet distance of pixels", better="lower"),
    "latents": Measure(help="Frechet distance of latents", better="lower"),
    "latent_std": Measure(help="standard deviation of latents over real ones'", better="near_1"),
    "variance": Measure(help="variance of pixels among clips of one prompt", better=None),
}
_BETTER = ("lower", "higher", "near_1")


def _read_report(content: dict[str, object]) -> Report:
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise ValueError("it has no list of entries")
    rows = tuple(_entry(row) for row in entries[:MOST_ENTRIES] if isinstance(row, dict))
    table = content.get("metrics")
    measures = dict(_OLD_MEASURES)
    if isinstance(table, dict):
        measures |= {str(name): _measure(value) for name, value in table.items()}
    for row in rows:
        for name in row.metrics:
            # A judge's attribute, in reports of earlier releases.
            measures.setdefault(name, Measure(help="accuracy", better="higher"))
    used = list(dict.fromkeys(name for row in rows for name in row.metrics))[:MOST_METRICS]
    iteration = content.get("iteration")
    return Report(
        iteration=iteration if type(iteration) is int else None,
        entries=rows,
        measures={name: measures[name] for name in used},
        clips=content.get("clips"),
    )


def _measure(value: object) -> Measure:
    if not isinstance(value, dict):
        return Measure(help="", better=None)
    better = value.get("better")
    return Measure(
        help=str(value.get("help") or ""), better=str(better) if better in _BETTER else None
    )


def _entry(row: Mapping[str, object]) -> Entry:
    calls = row.get("model_calls_per_clip")
    return Entry(
        name=as_text(row.get("name")),
        weights=str(row.get("weights") or ""),
        sampler=_describe_sampler(row.get("sampler")),
        calls=calls if type(calls) is int and calls > 0 else None,
        seconds=_number(row.get("seconds_per_clip")),
        metrics=_metrics_of(row),
    )


def _metrics_of(row: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of an entry; those of reports of earlier releases by their short names."""
    own = row.get("metrics")
    if isinstance(own, dict):
        return {str(name): number for name, v in own.items() if (number := _number(v)) is not None}
    named: dict[str, object] = {"fd": row.get("frechet_distance")}
    for part in ("distances", "accuracy"):
        values = row.get(part)
        named |= values if isinstance(values, dict) else {}
    named["variance"] = row.get("within_caption_variance")
    return {name: number for name, v in named.items() if (number := _number(v)) is not None}


def _describe_sampler(sampler: object) -> str:
    if not isinstance(sampler, dict):
        return ""
    steps, times = sampler.get("steps"), sampler.get("timesteps")
    parts = [f"{steps} steps" if steps != 1 else "1 step"]
    if sampler.get("guidance") not in (None, 1, 1.0):
        parts.append(f"guidance {sampler['guidance']}")
    if isinstance(times, list) and len(times) <= 8:
        parts.append("t = " + ", ".join(f"{t:g}" for t in times if isinstance(t, int | float)))
    elif sampler.get("shift") not in (None, 1, 1.0):
        parts.append(f"shift {sampler['shift']}")
    if sampler.get("solver") not in (None, "euler"):
        parts.append(str(sampler["solver"]))
    return ", ".join(parts)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
