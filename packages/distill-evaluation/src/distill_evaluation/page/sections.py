"""The sections of the page, each as HTML. Whatever comes from files passes through ``text``."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from statistics import median

from distill_runtime import counted, printable

from distill_evaluation.page.clips import ClipPlace, EmbeddedClip, FilmStrip, PromptClips
from distill_evaluation.page.highlight import highlight
from distill_evaluation.page.runs import AlarmLine, Entry, Measure, Report, RunFolder
from distill_evaluation.page.series import GROUPS, OPEN_CHARTS, Curve, Panel, health_parts
from distill_evaluation.page.times import TimeShare, time_shares

Html = str
"""Text that is HTML already."""

_COLOURS = 8
_MOST_TEXT = 2000
_STUDENT = "student"
"""The role that a method trains to be sampled, by custom."""
_OURS = "distill-"
"""Before the names of our packages, which mostly have one version."""
_HARD_EDGES = 200
"""Smaller clips are shown with hard pixel edges."""
_MOST_DIFFERENCES = 300

NAV = (
    ("alarms", "Alarms"), ("clips", "Clips"), ("curves", "Curves"), ("quality", "Quality"),
    ("time", "Time"), ("environment", "Environment"), ("run-file", "Run file"),
)  # fmt: skip


def text(value: object, *, most: int = _MOST_TEXT) -> Html:
    """Escape ``value`` for HTML, with whatever a page would hide or reorder made visible."""
    shown = printable(str(value))
    return escape(shown if len(shown) <= most else f"{shown[:most]} ...", quote=True)


def number(value: float | None) -> Html:
    """Write a number of a table with four digits."""
    if value is None:
        return '<span class="soft">–</span>'
    if not math.isfinite(value):
        return text(value)
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-4 or value == 0 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """Write a time as people say it."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _dot(place: int) -> Html:
    return f'<i class="dot" style="background:var(--c{place % _COLOURS})"></i>'


# -- head -----------------------------------------------------------------------------------------


def header(runs: Sequence[RunFolder]) -> Html:
    """Say what was run; for one run with its key numbers."""
    count = sum(len(run.alarms or ()) for run in runs)
    badge = f' <span class="count">{count}</span>' if count else ""
    links = "".join(
        f'<li><a href="#{anchor}">{label}{badge if anchor == "alarms" else ""}</a></li>'
        for anchor, label in NAV
    )
    head = _head_of_one(runs[0]) if len(runs) == 1 else _head_of_several(runs)
    return (
        '<a class="skip" href="#alarms">Skip to the content</a>'
        f'<header class="top">{head}</header><nav aria-label="Sections"><ul>{links}</ul></nav>'
    )


def _head_of_one(run: RunFolder) -> Html:
    return (
        f'<p class="over">{text(run.folder)}</p><h1>{text(run.name)} {_pill(run)}</h1>'
        f'<p class="lead">{_lead(run)}</p>{_tiles(run)}'
    )


def _head_of_several(runs: Sequence[RunFolder]) -> Html:
    rows = "".join(
        f"<li>{_dot(place)}<b>{text(run.name)}</b> {_pill(run)} "
        f'<span class="soft">{_lead(run)}</span></li>'
        for place, run in enumerate(runs)
    )
    return f'<h1>{len(runs)} runs compared</h1><ul class="runs">{rows}</ul>'


def _pill(run: RunFolder) -> Html:
    labels = {"finished": "finished", "running": "running", "stopped": "stopped",
              "unknown": "end not recorded"}  # fmt: skip
    return f'<span class="pill {run.state}">{labels[run.state]}</span>'


def _lead(run: RunFolder) -> Html:
    method, family = run.setting("recipe.method"), run.setting("recipe.family")
    steps = run.number("training.max_train_steps")
    parts = []
    if method:
        parts.append(f"<b>{text(method)}</b>" + (f" on <b>{text(family)}</b>" if family else ""))
    if run.iteration is not None:
        of = f" of {steps:,.0f}" if steps else ""
        parts.append(f"iteration {run.iteration:,}{of}")
    if run.metrics.times:
        day = datetime.datetime.fromtimestamp(run.metrics.times.values[0]).astimezone()
        parts.append(f"started {day.strftime('%d %B %Y, %H:%M')}")
    if run.end and run.state == "stopped":
        parts.append(f"stopped: {text(run.end, most=300)}")
    return " · ".join(parts) or "nothing is recorded of what was run"


def _tiles(run: RunFolder) -> Html:
    tiles = list(_quality_tiles(run))
    batch, iteration = run.number("training.global_batch_size"), run.iteration
    if iteration is not None and batch:
        tiles.append(("Samples seen", f"{iteration * batch:,.0f}", f"{batch:,.0f} an iteration"))
    shares = time_shares(run.metrics)
    if shares:
        whole = sum(share.seconds for share in shares)
        each = run.metrics.series.get("time/iteration")
        note = f"{duration(median(each.values))} an iteration (median)" if each else ""
        tiles.append(("Time", duration(whole), note))
    for name, label in (("memory/device", "Device memory"), ("memory/host", "Host memory")):
        series = run.metrics.series.get(name)
        if series:
            tiles.append((label, f"{max(series.values):.3g} GB", "peak of the first process"))
            break
    cells = "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>"
        for label, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>' if tiles else ""


def _quality_tiles(run: RunFolder) -> Iterable[tuple[Html, Html, Html]]:
    """The student beside what it was distilled from: first measure, calls, seconds."""
    report = run.report
    if report is None:
        return
    student = next(
        (e for e in report.entries if _role_of(run, e) == _STUDENT and e.calls is not None), None
    )
    teacher = _reference(report)
    if student is None or teacher is None or student is teacher:
        return
    for name in list(report.measures)[:1]:
        if name in student.metrics:
            beside = f"{text(teacher.name)}: {number(teacher.metrics.get(name))}"
            yield f"{_label(name)}, {text(student.name)}", number(student.metrics[name]), beside
    assert student.calls is not None
    assert teacher.calls is not None
    yield "Model calls a clip", f"{student.calls}", f"{text(teacher.name)}: {teacher.calls}"
    if student.seconds and teacher.seconds:
        faster = teacher.seconds / student.seconds
        yield "Sampling", f"{faster:.3g}× faster", f"{duration(student.seconds)} a clip"


def _role_of(run: RunFolder, entry: Entry) -> str | None:
    return run.setting(f"callbacks.report.entries.{entry.name}.role")


def _reference(report: Report) -> Entry | None:
    """The entry that makes the most model calls: what others are compared with."""
    known = [entry for entry in report.entries if entry.calls is not None]
    return max(known, key=lambda entry: entry.calls or 0, default=None)


def problems(found: Sequence[str]) -> Html:
    """List what could not be read."""
    if not found:
        return ""
    rows = "".join(f"<li>{text(problem)}</li>" for problem in found[:50])
    return (
        '<section id="problems"><h2>Not everything could be read</h2>'
        f'<p class="about">The rest of the page is complete.</p><ul>{rows}</ul></section>'
    )


# -- alarms ---------------------------------------------------------------------------------------


def alarms(runs: Sequence[RunFolder]) -> Html:
    """List the alarms, or say that there are none, or that nobody looked."""
    parts = []
    for place, run in enumerate(runs):
        title = f"<h3>{_dot(place)} {text(run.name)}</h3>" if len(runs) > 1 else ""
        if run.alarms is None:
            parts.append(f'{title}<p class="quiet">The run was not watched for known failures '
                         "(callback <code>health</code>).</p>")  # fmt: skip
        elif not run.alarms:
            parts.append(f'{title}<p class="quiet good">No alarm: nothing that was watched left '
                         "its bounds.</p>")  # fmt: skip
        else:
            rows = "".join(
                f'<li class="{"stop" if alarm.action == "stop" else "warn"}">'
                f"<span><b>{text(alarm.rule)}</b></span>"
                f'<span class="where">iteration {alarm.iteration:,}{_bounds(alarm)}</span>'
                f"<p>{text(alarm.message)}</p></li>"
                for alarm in run.alarms
            )
            parts.append(f'{title}<ul class="alarms">{rows}</ul>')
    return f'<section id="alarms"><h2>Alarms</h2>{"".join(parts)}</section>'


def _bounds(alarm: AlarmLine) -> Html:
    if alarm.value is None:
        return ""
    against = "" if alarm.threshold is None else f", threshold {number(alarm.threshold)}"
    return f" · {number(alarm.value)}{against}"


# -- clips ----------------------------------------------------------------------------------------


def clips(
    runs: Sequence[RunFolder],
    prompts: Sequence[Sequence[PromptClips]],
    ready: Mapping[ClipPlace, EmbeddedClip],
    left_out: int,
) -> Html:
    """Show clips by prompt: of the report side by side, of validations over time."""
    finals = _by_prompt(prompts, lambda row: bool(row.finals))
    moving = _by_prompt(prompts, lambda row: bool(row.frozen or row.strips))
    parts = []
    if finals:
        cards = "".join(_final_card(prompt, rows, runs, ready) for prompt, rows in finals.items())
        parts.append(
            '<p class="about">Equal noise in each row: what differs is the model and how it is '
            f'sampled.</p><div class="prompts">{cards}</div>'
        )
    if moving:
        cards = "".join(_moving_card(prompt, rows, runs, ready) for prompt, rows in moving.items())
        heading = "<h3>While it trained</h3>" if finals else ""
        parts.append(
            f'{heading}<p class="about">The same prompts from the same noise at each validation, '
            "the newest at the right. What does not change stands beside it, once.</p>"
            f'<div class="prompts">{cards}</div>'
        )
    if not parts:
        return _section("clips", "Clips", '<p class="quiet">There are no clips yet: they come with '
                        "a validation or a report.</p>")  # fmt: skip
    if left_out > 0:
        parts.append(
            f'<p class="about">{counted(left_out, "clip")} left out, the oldest first: the page '
            "stays small enough to be mailed, or they could not be read. All are in the output "
            "folder.</p>"
        )
    tools = '<div class="tools"><button type="button" data-play hidden></button></div>'
    return _section("clips", "Clips", tools + "".join(parts))


def _by_prompt(
    prompts: Sequence[Sequence[PromptClips]], has: Callable[[PromptClips], bool]
) -> dict[str, list[tuple[int, PromptClips]]]:
    """Group the rows of all runs that have something, each with the place of its run."""
    found: dict[str, list[tuple[int, PromptClips]]] = {}
    for place, rows in enumerate(prompts):
        for row in rows:
            if has(row):
                found.setdefault(row.prompt, []).append((place, row))
    return found


def _final_card(
    prompt: str,
    rows: Sequence[tuple[int, PromptClips]],
    runs: Sequence[RunFolder],
    ready: Mapping[ClipPlace, EmbeddedClip],
) -> Html:
    figures = []
    for place, row in rows:
        for name, clip in row.finals.items():
            if clip in ready:
                report = runs[place].report
                calls = {e.name: e.calls for e in report.entries} if report else {}
                count = calls.get(name)
                note = counted(count, "call") if count else ""
                figures.append(_figure(ready[clip], prompt, name, note, _run_of(runs, place)))
    if not figures:
        return ""
    return (
        f'<article class="prompt"><h3>{text(prompt)}</h3><div class="row">{"".join(figures)}</div>'
        "</article>"
    )


def _moving_card(
    prompt: str,
    rows: Sequence[tuple[int, PromptClips]],
    runs: Sequence[RunFolder],
    ready: Mapping[ClipPlace, EmbeddedClip],
) -> Html:
    parts = []
    for place, row in rows:
        still = "".join(
            _figure(ready[clip], prompt, view, "does not change", "")
            for view, clip in row.frozen.items()
            if clip in ready
        )
        strips = "".join(_strip(strip, prompt, ready) for strip in row.strips)
        run = f"<h4>{_dot(place)} {text(runs[place].name)}</h4>" if len(runs) > 1 else ""
        beside = f'<div class="still">{still}</div>' if still else ""
        parts.append(
            f'{run}<div class="over-time">{beside}<div class="strips">{strips}</div></div>'
        )
        if row.predicted is not None and row.predicted[1] in ready:
            iteration, film = row.predicted
            name = f"x0 as the roles predict it, iteration {iteration:,}"
            shown = _figure(ready[film], prompt, name, "", "")
            parts.append(f'<div class="film">{shown}</div>')
    return f'<article class="prompt wide"><h3>{text(prompt)}</h3>{"".join(parts)}</article>'


def _strip(strip: FilmStrip, prompt: str, ready: Mapping[ClipPlace, EmbeddedClip]) -> Html:
    figures = "".join(
        _figure(ready[clip], prompt, f"{iteration:,}", "", "")
        for iteration, clip in strip.clips.items()
        if clip in ready
    )
    label = text(f"{strip.view}, {prompt}, by iteration")
    return (
        f'<h4>{text(strip.view)} <span class="soft">by iteration</span></h4>'
        f'<div class="strip" role="region" tabindex="0" aria-label="{label}">{figures}</div>'
    )


def _run_of(runs: Sequence[RunFolder], place: int) -> Html:
    return f"{_dot(place)} {text(runs[place].name)}<br>" if len(runs) > 1 else ""


def _figure(clip: EmbeddedClip, prompt: str, name: str, note: str, run: Html) -> Html:
    label = text(f"{name}: {prompt}")
    size = f'width="{clip.width}" height="{clip.height}"'
    if clip.video:
        shown = (
            f'<video src="{clip.video_uri}" poster="{clip.poster_uri}" {size} muted loop '
            f'playsinline preload="none" aria-label="{label}"></video>'
        )
    else:
        shown = f'<img src="{clip.poster_uri}" {size} alt="{label}">'
    small = f"<small>{text(note)}</small>" if note else ""
    hard = " hard" if min(clip.width, clip.height) <= _HARD_EDGES else ""
    return (
        f'<figure class="clip{hard}">{shown}<figcaption>{run}{text(name)}{small}</figcaption>'
        "</figure>"
    )


# -- curves ---------------------------------------------------------------------------------------


def curves(panels: Sequence[Panel]) -> Html:
    """Leave a place for each chart; the script draws them."""
    if not panels:
        return _section("curves", "Curves", '<p class="quiet">No number has been logged yet.</p>')
    parts = [
        '<div class="tools"><label>Smoothing <input type="range" id="smooth" min="0" max="98" '
        'value="0"> <output id="smoothed" for="smooth">off</output></label><label><input '
        'type="checkbox" id="log"> Logarithmic</label></div>'
        "<noscript><p class='quiet'>Curves are drawn by a script of this page.</p></noscript>"
    ]
    shown = 0
    for group in GROUPS:
        figures = "".join(
            _chart(panel, place) for place, panel in enumerate(panels) if panel.group == group
        )
        count = sum(panel.group == group for panel in panels)
        if count:
            is_open = " open" if shown < OPEN_CHARTS else ""
            shown += count
            parts.append(
                f'<details class="group"{is_open}><summary>{group}<small>'
                f'{counted(count, "chart")}</small></summary><div class="charts">{figures}</div>'
                "</details>"
            )
    about = '<p class="about">Point at a chart to read it, or focus it and use the arrow keys.</p>'
    return _section("curves", "Curves", about + "".join(parts))


def _chart(panel: Panel, place: int) -> Html:
    help = f"<span>{text(panel.help)}</span>" if panel.help else ""
    return (
        f'<figure class="chart" data-panel="{place}"><figcaption><b>{text(panel.title)}</b>{help}'
        f"</figcaption>{_legend(panel)}</figure>"
    )


def _legend(panel: Panel) -> Html:
    runs = len({curve.run for curve in panel.curves})
    labels = [curve_label(panel, curve, ()) for curve in panel.curves]
    if runs > 1 or len(labels) < 2:
        return ""
    rows = "".join(f"<li>{_dot(place)}{text(label)}</li>" for place, label in enumerate(labels))
    return f'<ul class="legend">{rows}</ul>'


def curve_label(panel: Panel, curve: Curve, runs: Sequence[RunFolder]) -> str:
    """Name a curve within its chart: by what distinguishes it from the others there."""
    first, _, rest = curve.name.partition("/")
    if panel.title.startswith("loss/"):
        own = "held-out data" if first == "validation" else "training"
    elif first == "report":
        own = rest.rpartition("/")[0]
    elif first == "health":
        of, _, more = health_parts(rest)
        own = " ".join(filter(None, (of, more))) or _STUDENT
    elif panel.title == curve.name:
        own = ""
    else:
        own = rest
    alone = len({c.name for c in panel.curves}) == 1
    own = own or ("" if alone else curve.name)
    if len(runs) > 1:
        return runs[curve.run].name if alone or not own else f"{runs[curve.run].name}, {own}"
    return own


# -- quality --------------------------------------------------------------------------------------


def quality(runs: Sequence[RunFolder]) -> Html:
    """Show quality against model calls and seconds, a row for each entry of each run's report."""
    reports = [(place, run.report) for place, run in enumerate(runs) if run.report is not None]
    if not reports:
        return _section("quality", "Quality and cost", '<p class="quiet">There is no report yet: '
                        "the callback <code>report</code> makes one at the end.</p>")  # fmt: skip
    measures: dict[str, Measure] = {}
    for _, report in reports:
        measures |= {name: m for name, m in report.measures.items() if name not in measures}
    rows = [(place, entry, report) for place, report in reports for entry in report.entries]
    best = {name: _best([entry for _, entry, _ in rows], name, m) for name, m in measures.items()}
    heads = "".join(f"<th class='num' scope='col'>{_head(name, m)}</th>"
                    for name, m in measures.items())  # fmt: skip
    run_head = "<th scope='col'>run</th>" if len(runs) > 1 else ""
    body = "".join(_quality_row(place, entry, report, runs, measures, best)
                   for place, entry, report in rows)  # fmt: skip
    return _section(
        "quality",
        "Quality and cost",
        '<p class="about">Each entry sampled the same prompts from the same noise. Seconds are of '
        'denoising alone, in batches. The best of each column stands out.</p><div class="scroll" '
        'role="region" tabindex="0" aria-label="Quality and cost"><table><thead><tr>'
        f"{run_head}<th scope='col'>sampled by</th><th scope='col'>how</th>"
        "<th class='num' scope='col'>model calls<small>a clip</small></th>"
        "<th class='num' scope='col'>seconds<small>a clip</small></th>"
        "<th class='num' scope='col'>speed-up</th>"
        f"{heads}</tr></thead><tbody>{body}</tbody></table></div>",
    )


def _quality_row(
    place: int,
    entry: Entry,
    report: Report,
    runs: Sequence[RunFolder],
    measures: Mapping[str, Measure],
    best: Mapping[str, float | None],
) -> Html:
    run = f"<td>{_dot(place)} {text(runs[place].name)}</td>" if len(runs) > 1 else ""
    weights = "averaged weights" if entry.weights == "ema" else ""
    teacher = _reference(report)
    faster = ""
    if teacher is not None and teacher.seconds and entry.seconds and entry is not teacher:
        faster = f"{teacher.seconds / entry.seconds:.3g}×"
    cells = "".join(
        f'<td class="num{" best" if _is(entry.metrics.get(name), best[name]) else ""}">'
        f"{number(entry.metrics.get(name))}</td>"
        for name in measures
    )
    return (
        f"<tr>{run}<th scope='row'>{text(entry.name)}<small>{weights}</small></th>"
        f"<td>{text(entry.sampler)}</td><td class='num'>{number(entry.calls)}</td>"
        f"<td class='num'>{number(entry.seconds)}</td><td class='num'>{faster}</td>{cells}</tr>"
    )


def _is(value: float | None, best: float | None) -> bool:
    return value is not None and value == best


def _best(entries: Sequence[Entry], name: str, measure: Measure) -> float | None:
    values = [v for e in entries if (v := e.metrics.get(name)) is not None and math.isfinite(v)]
    if len(values) < 2:
        return None
    if measure.better == "near_1":
        return min(values, key=lambda value: abs(value - 1))
    chooser = {"lower": min, "higher": max}.get(measure.better or "")
    return chooser(values) if chooser else None


def _label(name: str) -> Html:
    return "Frechet distance" if name == "fd" else text(name)


def _head(name: str, measure: Measure) -> Html:
    direction = {"lower": "lower is better", "higher": "higher is better",
                 "near_1": "best near 1"}.get(measure.better or "", "")  # fmt: skip
    return f'<span title="{text(measure.help)}">{_label(name)}</span><small>{direction}</small>'


# -- time -----------------------------------------------------------------------------------------


def times(runs: Sequence[RunFolder]) -> Html:
    """Show what took the time, and the peaks of memory."""
    parts = []
    for place, run in enumerate(runs):
        shares = time_shares(run.metrics)
        title = f"<h3>{_dot(place)} {text(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(title + (_bar(shares) if shares else _NO_TIMES) + _machine_facts(run))
    return _section("time", "Time and memory", "".join(parts))


_NO_TIMES = '<p class="quiet">Too little has been logged to tell.</p>'


def _bar(shares: Sequence[TimeShare]) -> Html:
    whole = sum(share.seconds for share in shares) or 1.0
    cells = "".join(
        f'<i style="flex:{share.seconds / whole:.5f};background:var(--c{place % _COLOURS})"></i>'
        for place, share in enumerate(shares)
    )
    rows = "".join(
        f"<li>{_dot(place)}{text(share.name)} <b>{share.seconds / whole:.1%}</b> "
        f'<span class="soft">{duration(share.seconds)}</span></li>'
        for place, share in enumerate(shares)
    )
    return (
        f'<p class="about">{duration(whole)} between the first and the last log point.</p>'
        f'<div class="bar" aria-hidden="true">{cells}</div><ul class="shares">{rows}</ul>'
    )


def _machine_facts(run: RunFolder) -> Html:
    facts = []
    for name, label in (
        ("samples_per_second", "samples a second"), ("time/iteration", "an iteration"),
        ("memory/device", "device memory, peak"), ("memory/host", "host memory, peak"),
    ):  # fmt: skip
        series = run.metrics.series.get(name)
        if not series:
            continue
        middle = median(series.values)
        if name.startswith("memory"):
            facts.append((label, f"{max(series.values):.3g} GB"))
        else:
            shown = duration(middle) if name.startswith("time") else number(middle)
            facts.append((label, f"{shown} (median)"))
    rows = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in facts)
    return f'<dl class="facts" style="margin-top:1rem">{rows}</dl>' if facts else ""


# -- environment and run file ---------------------------------------------------------------------


def environment(runs: Sequence[RunFolder]) -> Html:
    """Show where the runs ran, and versions."""
    blocks = []
    for place, run in enumerate(runs):
        title = f"<h3>{_dot(place)} {text(run.name)}</h3>" if len(runs) > 1 else ""
        if not run.environment:
            blocks.append(f'{title}<p class="quiet">Not recorded: the run is of an earlier '
                          "release, or has not come to its first iteration.</p>")  # fmt: skip
            continue
        blocks.append(f'{title}<div class="two">{_machine(run)}{_packages(run)}</div>')
    return _section("environment", "Environment", "".join(blocks))


def _machine(run: RunFolder) -> Html:
    own = run.environment
    device = own.get("device")
    device = device if isinstance(device, dict) else {}
    memory = device.get("memory_bytes")
    rows: list[tuple[str, object]] = [
        ("Device", device.get("name") or device.get("type")),
        ("Device memory", f"{memory / 1e9:.1f} GB" if isinstance(memory, int) else None),
        ("CUDA", device.get("cuda")),
        ("Processes", own.get("processes")),
        ("Strategy", own.get("strategy")),
        ("System", own.get("system")),
        ("Python", own.get("python")),
        ("Seed", run.setting("training.seed")),
        ("Starts", len(run.starts) or None),
    ]
    cells = "".join(
        f"<dt>{label}</dt><dd>{text(value)}</dd>" for label, value in rows if value is not None
    )
    return f'<dl class="facts">{cells}</dl>'


def _packages(run: RunFolder) -> Html:
    packages = run.environment.get("packages")
    if not isinstance(packages, dict):
        return ""
    ours = {name: version for name, version in packages.items() if name.startswith(_OURS)}
    rows = dict(packages)
    if len(ours) > 1 and len(set(map(str, ours.values()))) == 1:
        rows = {name: version for name, version in packages.items() if name not in ours}
        rows[f"{_OURS}... ({len(ours)})"] = next(iter(ours.values()))
    cells = "".join(
        f"<dt>{text(name)}</dt><dd>{text(version)}</dd>" for name, version in rows.items()
    )
    return f'<dl class="facts">{cells}</dl>'


def run_files(runs: Sequence[RunFolder]) -> Html:
    """Show the run file; of several runs, what differs between their settings."""
    if len(runs) > 1:
        return _section("run-file", "What differs between the run files", _differences(runs))
    [run] = runs
    if run.run_file is not None:
        name, content = run.run_file
        shown = f'<p class="about">{text(name)}, as it was written.</p>'
    elif run.settings:
        content = "\n".join(f"{key}: {value}" for key, value in run.settings.items())
        shown = '<p class="about">Every setting, defaults included, from a checkpoint.</p>'
    else:
        return _section("run-file", "Run file", '<p class="quiet">Not recorded.</p>')
    code = f"<code>{highlight(printable(content))}</code>"
    return _section(
        "run-file", "Run file", f'{shown}<pre tabindex="0" aria-label="Run file">{code}</pre>'
    )


def _differences(runs: Sequence[RunFolder]) -> Html:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    unlike = [
        key
        for key in keys
        if key != "training.output_dir" and len({run.settings.get(key) for run in runs}) > 1
    ]
    if not unlike:
        return '<p class="quiet">Their settings are equal, but for the output folder.</p>'
    heads = "".join(f"<th scope='col'>{_dot(place)} {text(run.name)}</th>"
                    for place, run in enumerate(runs))  # fmt: skip
    rows = "".join(
        f"<tr><th scope='row'><code>{text(key)}</code></th>"
        + "".join(
            f"<td><code>{text(run.settings.get(key, '–'), most=300)}</code></td>" for run in runs
        )
        + "</tr>"
        for key in unlike[:_MOST_DIFFERENCES]
    )
    more = len(unlike) - _MOST_DIFFERENCES
    rest = f'<p class="about">{more:,} more differ.</p>' if more > 0 else ""
    return (
        '<div class="scroll tall" role="region" tabindex="0" aria-label="Differences"><table '
        f"class='diff'><thead><tr><th scope='col'>key</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{rest}"
    )


def _section(anchor: str, title: str, content: Html) -> Html:
    return f'<section id="{anchor}"><h2>{title}</h2>{content}</section>'
