"""The page of a run: what stands in it, whatever the files hold; and that it loads nothing."""

from __future__ import annotations

import json
import math
import os
import time
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, browser
from distill_evaluation.page import PageInfo, read_run, write_page
from distill_evaluation.page.callback import PageCallback
from distill_evaluation.page.clips import ClipStore
from distill_evaluation.page.config import PageConfig
from distill_evaluation.page.document import MOST_PAGE_BYTES
from distill_evaluation.page.highlight import MOST_CHARACTERS, highlight
from distill_evaluation.page.series import MetricsReader, Series, thin_out
from distill_evaluation.page.times import time_shares
from distill_media import encode_mp4
from distill_protocols import Callback, RunState
from distill_trainer import DistillTrainer
from toy_trainer import alternating, batches, training

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><b>\u202eprompt & 'quotes'"
VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """What a parser of HTML sees: elements, whether each is closed, texts, scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(path.read_text("utf-8"))
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def clip(seed: int, frames: int = 6, side: int = 32) -> np.ndarray:
    """A square that moves, in a colour of its own."""
    colour = np.random.default_rng(seed).integers(80, 255, 3)
    video = np.zeros((frames, side, side, 3), np.uint8)
    for n in range(frames):
        video[n, 4 + 2 * n : 16 + 2 * n, 6:20] = colour
    return video


def write_run(
    folder: Path, *, name: str = "student_2", points: int = 60, validations: int = 4, side: int = 32
) -> Path:
    """Write everything that a run leaves, with a hostile prompt and a hostile entry among them."""
    folder.mkdir(parents=True)
    prompts = ["a red fox in the snow", HOSTILE]
    lines = []
    for n in range(1, points + 1):
        i = n * 10
        values = {
            "loss/dmd_loss": 0.2 + math.exp(-n / 8) + 0.02 * math.sin(7.0 * n),
            "loss/critic_loss": 0.5 + 0.05 * math.sin(3.0 * n),
            "validation/loss/dmd_loss": 0.22 + math.exp(-n / 9),
            f"report/{name}/fd": 40 * math.exp(-n / 20) + 5,
            "report/teacher_32/fd": 4.5,
            "health/motion": 1 + 0.1 * math.sin(n),
            **({"health/teacher/motion": 1.05} if n == 1 else {}),
            "student_std": 1.0 + 0.1 * math.cos(n),
            "student_std/exit_0": 0.9,
            "grad_norm/student.transformer": 0.3,
            "grad_norm/critic.transformer": "inf" if n == 7 else 0.4,
            "lr/student.transformer": 4e-4 * (1 - n / points),
            "time/data": 0.002,
            "time/iteration": 0.1,
            "time/callback/validation": 0.01,
            "memory/host": 1.5,
            "samples_per_second": 640.0,
            HOSTILE: 1.0,
        }
        lines.append(json.dumps({"iteration": i, "time": 1.8e9 + n, **values}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    alarm = {
        "iteration": 200, "rule": "saturation", "action": "warn", "value": 1.4, "threshold": 1.2,
        "reference": "teacher",
        "message": f"clips are more saturated than the teacher's; lower the guidance {HOSTILE}",
    }  # fmt: skip
    stop = alarm | {"rule": "collapse", "action": "stop", "iteration": 400}
    (folder / "health.jsonl").write_text("".join(json.dumps(a) + "\n" for a in (alarm, stop)))
    entries = {
        "teacher_32": (64, 0.11, 4.5), name: (2, 0.004, 5.3), HOSTILE: (1, 0.002, 9.9),
    }  # fmt: skip
    (folder / "report").mkdir()
    for number in range(len(entries)):
        (folder / "report" / f"e{number}").mkdir()
        for row in range(2):
            video = encode_mp4(clip(number + 7 * row, side=side), fps=6, smallest_side=128)
            (folder / "report" / f"e{number}" / f"{row:03d}.mp4").write_bytes(video)
    report = {
        "iteration": points * 10,
        "metrics": {"fd": {"help": "Frechet distance", "better": "lower"},
                    "motion": {"help": "frame difference", "better": "near_1"}},
        "clips": {"prompts": prompts, "fps": 6, "entries": {
            entry: {"folder": f"report/e{n}", "files": ["000.mp4", "001.mp4"]}
            for n, entry in enumerate(entries)}},
        "entries": [
            {"name": entry, "weights": "ema", "sampler": {"steps": calls, "guidance": 1.5},
             "model_calls_per_clip": calls, "seconds_per_clip": seconds,
             "metrics": {"fd": fd, "motion": 0.8 + fd / 50}}
            for entry, (calls, seconds, fd) in entries.items()],
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    _write_validations(folder / "validation", prompts, validations, points * 10, side)
    record = {
        "run_file": {"name": "run.yaml", "text": f"# {HOSTILE}\nrecipe: {{method: dmd2}}\n"},
        "settings": {
            "recipe": {"method": "dmd2", "family": "wan"},
            "training": {"max_train_steps": points * 10, "global_batch_size": 64, "seed": 0},
            "method_config": {"guidance": 1.5, "note": HOSTILE},
            "callbacks": {"report": {"entries": {name: {"role": "student"}}}},
        },
        "environment": {
            "python": "3.11", "system": "Linux", "processes": 8, "strategy": "fsdp2",
            "device": {"type": "cuda", "name": "NVIDIA H200", "memory_bytes": 140 * 10**9},
            "packages": {"torch": "2.15.0", HOSTILE: HOSTILE},
        },
        "starts": [{"time": 1.8e9, "ended": 1.8e9 + points, "stop_reason": None}],
    }  # fmt: skip
    (folder / "run_record.json").write_text(json.dumps(record))
    (folder / "run.json").write_text(json.dumps({"format": "distill-run", "finished": points * 10}))
    return folder


def _write_validations(base: Path, prompts: list[str], count: int, last: int, side: int) -> None:
    def write(folder: Path, seed: int) -> None:
        folder.mkdir(parents=True)
        for row in range(len(prompts)):
            video = encode_mp4(clip(seed + row, side=side), fps=6, smallest_side=128)
            (folder / f"{row:03d}.mp4").write_bytes(video)

    write(base / "kept" / "teacher_2", 50)
    for n in range(1, count + 1):
        folder = base / f"iteration-{n * last // count:06d}"
        write(folder / "student_2", 60 + 10 * n)
        files = [f"{row:03d}.mp4" for row in range(len(prompts))]
        content = {
            "iteration": n * last // count, "fps": 6, "prompts": prompts,
            "views": {
                "teacher_2": {"role": "teacher", "folder": "kept/teacher_2", "files": files},
                "student_2": {"role": "student", "folder": f"{folder.name}/student_2",
                              "files": files},
            },
            "x0": {"folder": f"{folder.name}/x0", "files": files, "view": "teacher_2",
                   "roles": ["student", "teacher"], "t": [250, 750]},
        }  # fmt: skip
        if n == count:  # of the others their films are lost
            write(folder / "x0", 90)
        (folder / "validation.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("page") / "full")


@pytest.fixture(scope="module")
def written(full: Path) -> PageInfo:
    return write_page([read_run(full)], full / "report.html")


def test_all_sections_stand_in_a_page_that_a_parser_takes(written: PageInfo) -> None:
    page = Page(written.path)
    ids = [attributes.get("id") for attributes in page.attributes("section")]
    assert ids == ["alarms", "clips", "curves", "quality", "time", "environment", "run-file"]
    text = " ".join(page.texts)
    for part in (
        "dmd2",
        "finished",
        "NVIDIA H200",
        "27.5× faster",
        "38,400",
        "saturation",
        "fsdp2",
    ):
        assert part in text
    # Of 2 prompts 3 entries, 4 validations, the view that does not change, and predictions.
    assert written.clips == len(page.attributes("video")) == 2 * (3 + 4 + 1 + 1)
    assert written.left_out == 0
    assert not written.problems
    panels = json.loads(page.scripts[0])["panels"]
    by_title = {panel["title"]: panel for panel in panels}
    assert [c["label"] for c in by_title["loss/dmd_loss"]["curves"]] == [
        "training",
        "held-out data",
    ]
    motion = by_title["health: motion"]["curves"]
    assert [(c["label"], len(c["x"])) for c in motion] == [("student", 60), ("teacher", 1)]
    critic = by_title["gradient norms"]["curves"][1]
    assert critic["y"][6] is None, "inf is no number of JSON"
    assert panels[0]["title"].startswith("loss/"), "losses come first"


def test_nothing_of_the_files_becomes_markup_and_nothing_is_loaded(written: PageInfo) -> None:
    page = Page(written.path)
    assert len(page.scripts) == len(page.attributes("script")) == 2, "data, and our own"
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert not page.attributes("b") or "taken" not in str(page.attributes("img"))
    for _, attributes in page.elements:
        for key in ("src", "href", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:", "#")), value
    assert "\u202e" not in written.path.read_text("utf-8"), "it would reverse what follows"
    policy = page.attributes("meta")[1]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


FILES = (
    "metrics.jsonl", "health.jsonl", "report.json", "run_record.json", "run.json",
    "validation/iteration-000300/validation.json",
)  # fmt: skip
DAMAGE = (
    b"", b"\x00\xff{", b"[1, 2]", b'{"entries": {"a": []}, "x": 1}', b'{"iteration": 1e400}',
    b'{"entries": [{"name": 3}, 5]}',
    b'{"entries": [{"name": "a", "metrics": {"x": 1.0}}], "metrics": {"x": 3}}',
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_file_costs_what_it_held_alone(
    full: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    _link_all(full, tmp_path / "run")
    target = tmp_path / "run" / name
    target.unlink()
    # A last line without an end is being written, and no damage.
    target.write_bytes(content + b"\n" if name.endswith(".jsonl") else content)
    info = write_page([read_run(tmp_path / "run")], tmp_path / "p.html")
    assert Page(info.path).attributes("section")
    assert info.clips > 0
    if content and name != "metrics.jsonl" and content[:1] != b"{":
        assert info.problems


def test_what_is_too_large_for_a_page_is_not_read(tmp_path: Path) -> None:
    names = ("health.jsonl", "report.json")
    for name in names:
        with (tmp_path / name).open("wb") as file:
            file.truncate(32 * 2**20 + 1)  # a hole, which takes no disk
    problems = sorted(read_run(tmp_path).problems)
    assert [problem.split()[0] for problem in problems] == list(names)
    assert all("33554433 bytes; more than 33554432 are not read" in text for text in problems)


def _link_all(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            to = target / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.hardlink_to(path)


def test_clips_of_elsewhere_are_not_shown(full: Path, tmp_path: Path) -> None:
    _link_all(full, tmp_path / "run")
    outside = tmp_path / "secret.mp4"
    outside.write_bytes(encode_mp4(clip(1), fps=6))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    names = ["../../secret.mp4", str(outside)]
    report["clips"]["entries"] = {"thief": {"folder": "report/e0", "files": names}}
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    (tmp_path / "run" / "validation" / "iteration-000300" / "validation.json").unlink()
    info = write_page([read_run(tmp_path / "run")], tmp_path / "p.html")
    assert info.clips == 2 * (3 + 1 + 1)


def test_a_folder_of_an_earlier_release_shows_its_clips_and_numbers(tmp_path: Path) -> None:
    from distill_media import clips_to_gif

    run = tmp_path / "old"
    for iteration in (10, 20):
        folder = run / "validation" / f"iteration-{iteration:06d}"
        folder.mkdir(parents=True)
        (folder / "prompts.json").write_text('["a", "b"]')
        for view, seed in (("teacher", 0), ("student", iteration)):
            clips = np.stack([clip(seed), clip(seed + 1)])
            (folder / f"{view}.gif").write_bytes(clips_to_gif(clips, 6))
    entry = {"name": "student_2", "frechet_distance": 5.3, "accuracy": {"digit": 0.9},
             "within_caption_variance": 0.05, "model_calls_per_clip": 2, "seconds_per_clip": 0.1,
             "sampler": {"steps": 2, "timesteps": [1000.0, 700.0]}, "distances": None}  # fmt: skip
    (run / "report.json").write_text(json.dumps({"iteration": 20, "entries": [entry]}))
    checkpoint = run / "checkpoint-000020"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"recipe": {"method": "kd"}}')
    shown = read_run(run)
    assert shown.setting("recipe.method") == "kd"
    info = write_page([shown], run / "report.html")
    assert info.clips == 2 + 4, "the teacher's are equal, so they are shown once"
    text = " ".join(Page(info.path).texts)
    assert "t = 1000, 700" in text
    assert "0.9" in text


def test_two_runs_are_compared_by_prompt_curve_and_setting(full: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", name="student_4")
    record = json.loads((other / "run_record.json").read_text())
    record["settings"]["method_config"]["guidance"] = 3.0
    (other / "run_record.json").write_text(json.dumps(record))
    info = write_page([read_run(full), read_run(other)], tmp_path / "ab.html")
    page = Page(info.path)
    text = " ".join(page.texts)
    assert "method_config.guidance" in text
    assert "training.seed" not in text, "it is equal"
    panels = {panel["title"]: panel for panel in json.loads(page.scripts[0])["panels"]}
    loss = panels["loss/critic_loss"]
    assert [(c["label"], c["colour"]) for c in loss["curves"]] == [("full", 0), ("other", 1)]
    # A run has one colour, and dashes tell its curves apart.
    motion = panels["health: motion"]["curves"]
    assert [(c["colour"], c["dash"]) for c in motion] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert info.clips == 2 * 2 * (3 + 4 + 1 + 1)


def test_too_many_clips_leave_out_those_of_the_oldest_validations(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_evaluation.page.document.MOST_CLIPS", 12)
    info = write_page([read_run(full)], tmp_path / "p.html")
    assert (info.clips, info.left_out) == (12, 6)
    captions = [t for t in Page(info.path).texts if t in {"150", "300", "450", "600"}]
    assert captions == ["600"] * 2
    assert "6 clips left out" in " ".join(Page(info.path).texts)


def test_clips_are_made_ready_once(full: Path, tmp_path: Path, monkeypatch) -> None:
    store = ClipStore()
    first = write_page([read_run(full)], tmp_path / "a.html", store=store)
    monkeypatch.setattr(ClipStore, "_make", lambda self, place: pytest.fail("it was there"))
    second = write_page([read_run(full)], tmp_path / "b.html", store=store)
    assert first.clips == second.clips


def test_metrics_are_read_on_and_anew_where_a_resume_took_lines_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def line(iteration: int, value: float) -> str:
        return json.dumps({"iteration": iteration, "time": 0.0, "loss": value}) + "\n"

    path.write_text(line(1, 0.1) + line(2, 0.2) + '{"iteration": 3, "lo')
    reader = MetricsReader(path)
    reader.update()
    assert reader.series["loss"].values == [0.1, 0.2]
    with path.open("a") as file:
        file.write('ss": 0.3}\n' + "no JSON\n" + line(2, 0.25))
    reader.update()
    assert reader.series["loss"].iterations == [1, 2]
    assert reader.series["loss"].values == [0.1, 0.25], "what a killed process logged gives way"
    assert reader.skipped == 1
    other = tmp_path / "part"
    other.write_text(line(1, 0.5))
    other.replace(path)
    reader.update()
    assert reader.series["loss"].values == [0.5]


def test_metrics_that_cannot_be_drawn_or_dated_leave_a_page(tmp_path: Path) -> None:
    lines = [
        {"iteration": n, "time": time_, "loss/a": 1.0}
        for n, time_ in enumerate(("nan", 1e300, -1e15, "inf"), start=1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = read_run(tmp_path)
    assert run.metrics.skipped == 4
    assert len(run.metrics.series["loss/a"]) == 4
    assert write_page([run], tmp_path / "p.html").problems

    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")  # opening it would wait for ever
    assert not read_run(tmp_path).metrics.series


def test_a_thinned_curve_keeps_every_spike() -> None:
    series = Series(list(range(5000)), [0.0] * 5000)
    series.values[1234], series.values[4321], series.values[77] = 9.0, -9.0, math.nan
    curve = thin_out("a", 0, series, most=100)
    assert len(curve.x) <= 200
    assert {9.0, -9.0, None} <= set(curve.y)
    assert (curve.x[0], curve.x[-1], curve.points) == (0, 4999, 5000)
    assert list(curve.x) == sorted(curve.x)


def test_time_is_divided_by_what_took_it(tmp_path: Path) -> None:
    reader = MetricsReader(tmp_path / "none")
    for iteration, at in ((10, 100.0), (20, 110.0), (30, 120.0), (40, 5000.0), (50, 5010.0)):
        reader.times.add(iteration, at)
        reader.series.setdefault("time/data", Series()).add(iteration, 0.1)
        reader.series.setdefault("time/callback/report", Series()).add(iteration, 0.25)
    reader.series["time/checkpoint"] = Series([20], [2.0])
    shares = {share.name: share.seconds for share in time_shares(reader)}
    # Three stretches of 10 s; over the fourth the run stood still.
    assert shares == pytest.approx(
        {"training": 30 - 3 - 7.5 - 2, "waiting for data": 3.0, "callback report": 7.5,
         "saving checkpoints": 2.0}
    )  # fmt: skip


def test_a_run_file_is_highlighted_and_escaped() -> None:
    html = highlight('lr: 4.0e-4  # <b>\nname: "a # b"\npath: ./x-1\nflag: true\n')
    assert '<span class="key">lr</span>: <span class="number">4.0e-4</span>' in html
    assert '<span class="comment"># &lt;b&gt;</span>' in html
    assert '<span class="text">&quot;a # b&quot;</span>' in html
    assert '<span class="word">true</span>' in html
    assert "./x-1" in html
    # Lines on which every place could begin a key, or text that nothing ends.
    for long in ("x" * MOST_CHARACTERS, '"' + '\\"' * (MOST_CHARACTERS // 3)):
        assert highlight(long) == escape(long)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@needs_chromium
def test_in_a_browser_it_draws_plays_and_asks_for_nothing(
    written: PageInfo, tmp_path: Path
) -> None:
    with browser() as tab:
        for width in (1280, 390):
            for dark in (False, True):
                tab.open(written.path, width=width, dark=dark)
                assert tab.errors == []
                assert tab.requests == [written.path.resolve().as_uri()]
                assert tab.run("document.documentElement.scrollWidth") == width, (
                    "nothing sticks out"
                )
                assert tab.run("document.title") == "full"
        assert tab.run("document.querySelectorAll('.chart path').length") > 5
        assert tab.run("[...document.querySelectorAll('.chart path')].every(p => "
                       "!p.getAttribute('d').includes('NaN'))")  # fmt: skip
        waited = "new Promise(d => setTimeout(d, 1500)).then(() => {})"
        tab.run("document.querySelector('#clips').scrollIntoView()")
        tab.run(waited)
        assert tab.run("document.querySelector('video').videoWidth") == 128
        assert not tab.run("document.querySelector('video').paused")
        tab.run("document.querySelector('[data-play]').click()")
        assert tab.run("[...document.querySelectorAll('video')].every(v => v.paused)")
        # By keyboard: a focused chart is read out.
        tab.run("document.querySelector('.chart svg[tabindex]').focus()")
        tab.run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'Home'}))")
        assert (
            tab.run("document.querySelector('.tip:not([hidden]) b').textContent") == "iteration 10"
        )
        tab.open(written.path, width=1280, still=True)
        tab.run("document.querySelector('#clips').scrollIntoView()")
        tab.run(waited)
        assert tab.run("[...document.querySelectorAll('video')].every(v => v.paused)"), "as asked"


@needs_chromium
def test_a_long_run_opens_soon_and_stays_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", points=2000, validations=17, side=96)
    began = time.perf_counter()
    info = write_page([read_run(run)], tmp_path / "long.html")
    print(f"written in {time.perf_counter() - began:.2f} s, {info.size / 1e6:.2f} MB")
    assert info.clips == 2 * (3 + 17 + 1 + 1)
    assert info.size < MOST_PAGE_BYTES < 30e6
    with browser() as tab:
        print(f"opened in {tab.open(info.path, width=1280):.2f} s")
        assert tab.errors == []


def _train(folder: Path, *more: Callback, every: int = 2, steps: int = 4) -> Callback:
    page = PageCallback(PageConfig(every_steps=every))
    config = training(folder, steps, trackers=("jsonl",), log_every=1)
    DistillTrainer(config, callbacks=[*more, page]).run(alternating(), batches())
    return page


class _At(Callback):
    """Keeps the page as it is when an iteration begins, or ends the run there."""

    name = "at"

    def __init__(self, iteration: int, error: Exception | None = None) -> None:
        self.iteration, self.error = iteration, error
        self.page: str | None = None

    def on_step_start(self, run: RunState) -> None:
        if run.iteration == self.iteration:
            if self.error is not None:
                raise self.error
            path = run.output_dir / "report.html"
            self.page = path.read_text() if path.exists() else None


def test_a_run_keeps_its_page_up_to_date(tmp_path: Path) -> None:
    before, after = _At(2), _At(3)
    before.name = "before"
    _train(tmp_path, before, after)
    assert before.page is None
    assert after.page is not None
    assert '<span class="pill running">' in after.page
    text = (tmp_path / "report.html").read_text()
    assert '<span class="pill finished">' in text
    assert "iteration 4" in text


def test_a_run_that_fails_says_why_on_its_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _train(tmp_path, _At(3, ZeroDivisionError("a <b>reason</b>")), every=0)
    text = (tmp_path / "report.html").read_text()
    assert '<span class="pill stopped">' in text
    assert "ZeroDivisionError: a &lt;b&gt;reason&lt;/b&gt;" in text


def test_a_page_that_cannot_be_made_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr("distill_evaluation.page.callback.write_page", fail)
    _train(tmp_path)
    assert "report.html could not be written: KeyError: 'unforeseen'" in caplog.text
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4


def test_pages_that_take_long_are_written_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[float] = []
    now = [0.0]
    monkeypatch.setattr("distill_evaluation.page.callback.time.monotonic", lambda: now[0])

    def slow(*_: object, **__: object) -> None:
        written.append(now[0])
        now[0] += 1.0

    class Clock(Callback):
        name = "clock"

        def on_step_start(self, run: RunState) -> None:
            now[0] += 60.0

    monkeypatch.setattr("distill_evaluation.page.callback.write_page", slow)
    _train(tmp_path, Clock(), every=1, steps=5)
    # A second a page, so at most one in 100 seconds; and one at the end.
    assert written == [60.0, 181.0, 302.0, 303.0]
