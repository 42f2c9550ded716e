"""Clips from a run, a checkpoint and an export, through the app and the library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import ltx_pipelines
import pytest
import torch
import wan_variants
from app_ranks import sample
from diffusers import WanPipeline
from distill_adapters_ltx import PLUGIN as LTX
from distill_adapters_ltx import LTXPipelineConfig
from distill_adapters_wan import PLUGIN as WAN
from distill_media import read_last_frames
from distill_protocols import (
    ConditioningError,
    ConfigError,
    ContractError,
    ExportRequest,
    FamilyPlugin,
    RoleSpec,
    SamplerSpec,
)
from distill_runfile.cli import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from distill_sample import open_model, read_sample_source
from distill_sample.cli import main
from distill_sample.model import Model
from media_files import moving_frames, write_video
from PIL import Image
from ranks import run_on_ranks
from sample_app.conftest import PROMPTS, TEACHER


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frames_of(path: Path) -> list[Any]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def exported(family: FamilyPlugin[Any], config: Any, path: Path, folder: Path) -> Path:
    role = RoleSpec(name="student", path=str(path), trainable=True)
    request = ExportRequest(sampler=SamplerSpec(steps=2, shift=3.0))
    exporter = family.exporter(config, source=str(path))
    exporter.export(role, family.weights(str(path)), folder, request)
    return folder


def test_run_export_and_stock_pipeline_make_the_same_clip_to_the_bit(out):
    for folder in (out, out / "student"):  # as frozen roles, so without gradients or fp32 masters
        roles = read_sample_source(folder).roles.values()
        assert [role.spec.trainable for role in roles] == [False] * len(roles)
    run, export = open_model(out), open_model(out / "student")
    clips = run.sample(PROMPTS, seed=3)
    assert torch.equal(export.sample(PROMPTS, seed=3), clips)
    assert not torch.equal(open_model(out, weights="live").sample(PROMPTS, seed=3), clips)
    pipeline: Any = WanPipeline.from_pretrained(out / "student")
    call = json.loads((out / "student" / "sampler_spec.json").read_text())["call"]
    for number, prompt in enumerate(PROMPTS):
        torch.manual_seed(3 + number)
        stock = pipeline(prompt, output_type="pt", **call).frames
        assert torch.equal(stock.transpose(1, 2), clips[number : number + 1])
    together = run.sample(PROMPTS, seed=3, batch=2)
    torch.testing.assert_close(together, clips, rtol=0, atol=1e-4)
    later = run.sample(PROMPTS[1:], seed=3, first=1)
    assert torch.equal(later, clips[1:])


def test_the_app_writes_clips_sheets_and_what_made_them(out, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeff" + "\r\n\r\n".join(PROMPTS) + "\r\n")
    to = tmp_path / "to"
    args = [str(out), "--prompts", str(prompts), "--also", "teacher", "--to", str(to)]
    assert main([*args, "--seed", "3"]) == EXIT_OK
    assert {path.name for path in to.iterdir()} == {
        "000-the-digit-three-moving-up-student.mp4",
        "001-the-digit-seven-moving-left-student.mp4",
        "000-the-digit-three-moving-up-teacher.mp4",
        "001-the-digit-seven-moving-left-teacher.mp4",
        "contact_sheet.png", "contact_sheet.mp4", "samples.json",
    }  # fmt: skip
    clips = open_model(out).sample(PROMPTS, seed=3)
    expected = (clips.permute(0, 2, 3, 4, 1) * 255).round().numpy()
    for number, name in enumerate(
        ("000-the-digit-three-moving-up", "001-the-digit-seven-moving-left")
    ):
        frames = frames_of(to / f"{name}-student.mp4")
        assert len(frames) == clips.shape[2] == 9
        # Each pixel is 8 x 8 of the file's, and H.264 loses a little of each.
        assert abs(frames[4][4::8, 4::8].astype(float) - expected[number, 4]).mean() < 4
    record = json.loads((to / "samples.json").read_text())
    student, teacher = record["roles"]
    assert (student["weights"], teacher["weights"]) == ("ema", "of its path")
    assert student["sampler"]["timesteps"] == [1000, 700]
    assert teacher["sampler"] | TEACHER == teacher["sampler"]
    assert [clip["seed"] for clip in record["clips"]] == [3, 4]
    assert record["complete"]
    assert record["clips"][1]["files"] == {
        role: f"001-the-digit-seven-moving-left-{role}.mp4" for role in ("student", "teacher")
    }
    assert main([*args, "--steps", "1", "--solver", "unipc"]) == EXIT_OK
    record = json.loads((to / "samples.json").read_text())
    assert record["roles"][1]["sampler"]["solver"] == "unipc"
    assert record["roles"][0]["sampler"]["timesteps"] == [1000, 700]


def interrupt_after(method: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """Let a Ctrl-C come in the call after so many of ``method``."""
    left = [calls]

    def call(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return method(*args, **options)

    return call


def test_after_an_interrupt_the_record_names_what_is_there(out, tmp_path, monkeypatch):
    args = [str(out), *(f"--prompt={text}" for text in PROMPTS), "--to", str(tmp_path)]
    assert main([*args, "--format", "gif"]) == EXIT_OK
    assert {path.suffix for path in tmp_path.iterdir()} == {".gif", ".png", ".json"}
    monkeypatch.setattr(Model, "sample", interrupt_after(Model.sample, 1))
    assert main([*args, "--format", "gif"]) == EXIT_INTERRUPTED
    record = json.loads((tmp_path / "samples.json").read_text())
    assert not record["complete"]
    [clip] = record["clips"]
    assert clip["prompt"] == PROMPTS[0]
    assert (tmp_path / clip["files"]["student"]).is_file()
    assert list(tmp_path.glob("001*")) == [], "of the former call"


@pytest.mark.parametrize("format", ["mp4", "gif"])
def test_an_interrupted_stream_keeps_its_chunks(causal, tmp_path, monkeypatch, format):
    stream = Model.stream

    def interrupted(*args: Any, **options: Any) -> Any:
        chunks = stream(*args, **options)
        yield next(chunks)
        yield next(chunks)
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "stream", interrupted)
    args = [str(causal), "--prompt", PROMPTS[0], "--latent-frames", "9", "--to", str(tmp_path)]
    assert main([*args, "--format", format]) == EXIT_INTERRUPTED
    record = json.loads((tmp_path / "samples.json").read_text())
    assert not record["complete"]
    assert len(record["roles"][0]["seconds_per_chunk"]) == 2
    assert len(frames_of(tmp_path / record["clips"][0]["files"]["student"])) == 5


def test_clips_of_two_calls_do_not_mix(out):
    source = read_sample_source(out)
    first = out / "samples" / "checkpoint-000004"
    shutil.rmtree(out / "samples", ignore_errors=True)
    assert source.default_output == first
    for folder in (first, first.with_name("checkpoint-000004-2")):
        folder.mkdir(parents=True)
        (folder / "samples.json").write_text("{}")
    assert source.default_output == first.with_name("checkpoint-000004-3")


def test_two_processes_write_what_one_writes(out, tmp_path):
    files = {}
    for size in (1, 2):
        to = tmp_path / str(size)
        args = [str(out), *(f"--prompt={text}" for text in [*PROMPTS, "the digit one moving up"])]
        assert run_on_ranks(sample, [*args, "--to", str(to)], size=size) == [EXIT_OK] * size
        files[size] = {
            path.name: path.read_bytes()
            for path in to.iterdir()
            if path.is_file() and path.name != "samples.json"  # it has seconds
        }
    assert len(files[1]) == 5
    assert files[1] == files[2]


def test_a_stream_is_the_clip_and_goes_on_beyond_it(causal, tmp_path):
    model = open_model(causal)
    whole = model.sample(PROMPTS[:1], seed=1)
    chunks = list(model.stream(PROMPTS[0], frames=3, seed=1))
    assert [chunk.frames.shape[2] for chunk in chunks] == [1, 4, 4]
    streamed = torch.cat([chunk.frames for chunk in chunks], dim=2)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-5)
    to = tmp_path / "to"
    args = [str(causal), "--prompt", PROMPTS[0], "--to", str(to)]
    assert main([*args, "--latent-frames", "9"]) == EXIT_OK
    record = json.loads((to / "samples.json").read_text())
    assert len(record["roles"][0]["seconds_per_chunk"]) == 9
    [file] = to.glob("*.mp4")
    assert len(frames_of(file)) == 33


def test_a_role_that_is_not_causal_is_not_streamed(out, capsys):
    with pytest.raises(ContractError, match="'student' is not causal"):
        next(open_model(out).stream(PROMPTS[0], frames=3))
    args = [str(out), "--prompt", PROMPTS[0], "--latent-frames", "9"]
    assert main(args) == EXIT_USAGE
    assert "--latent-frames: 'student' is not causal" in capsys.readouterr().err


def test_a_model_of_pictures_begins_and_ends_with_those_that_it_is_given(tmp_path, capsys):
    template = wan_variants.template(tmp_path / "template")
    path = wan_variants.build("flf2v", template, tmp_path / "flf2v")
    folder = exported(WAN, wan_variants.VARIANTS["flf2v"].config, path, tmp_path / "student")
    with pytest.raises(ConditioningError, match="no first frame is given"):
        open_model(folder).sample(["waves"])
    wide, blue = tmp_path / "wide.png", tmp_path / "blue.jpg"
    Image.linear_gradient("L").resize((400, 100)).save(wide)
    Image.new("RGB", (90, 300), (20, 30, 200)).save(blue)
    to = tmp_path / "to"
    args = [str(folder), "--prompt", "waves", "--prompt", "rain", "--to", str(to)]
    assert main([*args, "--image", str(wide)]) == EXIT_USAGE
    assert "--image: role 'student': no last frame is given" in capsys.readouterr().err
    args += ["--last-image", str(wide)]
    assert main([*args, "--image", str(wide), "--image", str(blue)]) == EXIT_OK
    names = ("000-waves-student.mp4", "001-rain-student.mp4")
    both = [frames_of(to / name)[0] for name in names]
    assert abs(both[0].astype(float) - both[1]).mean() > 1
    assert main([*args, "--image", str(wide)]) == EXIT_OK
    assert (frames_of(to / names[0])[0] == both[0]).all()
    args[-1] = str(blue)
    assert main([*args, "--image", str(wide)]) == EXIT_OK
    assert (frames_of(to / names[0])[-1] != both[0]).any()


def test_a_clip_goes_on_from_the_last_frames_of_a_video(tmp_path, capsys):
    template = wan_variants.template(tmp_path / "template")
    path = wan_variants.build("ti2v", template, tmp_path / "ti2v")
    folder = exported(WAN, wan_variants.VARIANTS["ti2v"].config, path, tmp_path / "student")
    frames = moving_frames(12, 64, 96)
    video = write_video(tmp_path / "before.mp4", frames)
    args = [str(folder), "--prompt", "waves", "--to", str(tmp_path / "to")]
    for count, problem in (("4", "there must be 4k + 1"), ("9", "leaves nothing to be made")):
        assert main([*args, "--video", str(video), "--video-frames", count]) == EXIT_USAGE
        assert problem in capsys.readouterr().err
    assert main([*args, "--video", str(video), "--video-frames", "5"]) == EXIT_OK
    # The codec is causal: what is given is decoded as if nothing came after it.
    end = torch.from_numpy(read_last_frames(video, 5, (32, 48))).permute(3, 0, 1, 2)[None] / 255
    model = open_model(folder)
    given = model.adapter.decode(model.adapter.normalize_latents(model.adapter._codec.encode(end)))
    clip = model.sample(["waves"], images=end)
    assert torch.allclose(clip[:, :, :5], given, atol=1e-5)
    assert not torch.allclose(clip[:, :, :1], given[:, :, 4:], atol=1e-2)


def test_another_family_is_sampled_by_the_same_command(tmp_path):
    path = ltx_pipelines.build(tmp_path / "ltx", "0.9.1")
    config = LTXPipelineConfig(num_frames=9, height=32, width=64, max_sequence_length=8)
    folder = exported(LTX, config, path, tmp_path / "student")
    to = tmp_path / "to"
    assert main([str(folder), "--prompt", "waves", "--to", str(to), "--format", "png"]) == EXIT_OK
    pictures = sorted((to / "000-waves-student").iterdir())
    assert [picture.name for picture in pictures] == [f"{n:04d}.png" for n in range(9)]
    clip = open_model(folder).sample(["waves"])[0]
    with Image.open(pictures[5]) as picture:
        assert picture.size == (64, 32)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    shown = (clip[:, 5].permute(1, 2, 0) * 255).round().to(torch.uint8)
    assert torch.equal(pixels.view(32, 64, 3), shown)


@pytest.mark.parametrize(
    ("args", "problems"),
    [
        (["FROM"], ["no prompt"]),
        (["no-such-folder", "--prompt", "a"], ["no such folder"]),
        (["EMPTY", "--prompt", "a"], ["is no checkpoint"]),
        (["FROM", "--prompt", "a", "--role", "studnet"], ["'studnet' is no role of this run"]),
        (["FROM", "--prompt", "a", "--role", "critic"], ["how 'critic' is sampled", "--steps"]),
        (["FROM", "--prompt", "a", "--also", "critic", "--guidance", "2"],
         ["make a sampler with --steps", "how 'critic' is sampled"]),
        (["FROM", "--prompt", "a", "--role", "teacher", "--weights", "ema"],
         ["no trained role 'teacher'"]),
        (["FROM", "--prompt", "a", "--prompt", "b", "--latent-frames", "9"],
         ["streams one video", "not causal"]),
        (["FROM", "--prompt", "a", "--image", "none.png"], ["there is no file none.png"]),
        (["FROM", "--prompt", "a", "--image", "BINARY", "--video", "BINARY"],
         ["--image beside --video", "role 'student': frames of a clip are given, and the model"]),
        (["EXPORT", "--prompt", "a", "--last-image", "BINARY"], ["the model reads text alone"]),
        (["FROM", "--prompt", "a", "--steps", "2", "--guidance", "-1"], ["must be at least 0"]),
        (["FROM", "--prompts", "BINARY"], ["is no list of prompts, one a line in UTF-8"]),
        (["EXPORT", "--prompt", "a", "--also", "teacher"], ["holds one role"]),
        (["EXPORT", "--prompt", "a", "--role", "teacher"], ["holds 'student', and no role"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_listed(out, tmp_path, capsys, args, problems):
    binary, empty = tmp_path / "prompts", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.mkdir()
    names = {"FROM": out, "EXPORT": out / "student", "BINARY": binary, "EMPTY": empty}
    assert main([str(names.get(arg, arg)) for arg in args]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert [problem for problem in problems if problem not in error] == []


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("family", "wam", "unknown family 'wam'; did you mean 'wan'?"),
        ("family", ["wan"], "unknown family"),
        ("family", None, "does not say which family"),
        ("format", "comfyui", "holds weights alone"),
        ("sampler", {"steps": 0}, "sampler.steps"),
        ("sampler", 3, "sampler"),
        ("pipeline_config", {"num_frames": 10, "height": 32, "width": 32}, "4k + 1"),
        ("pipeline_config", None, "pipeline_config"),
        ("compute_precision", "int4", "compute_precision"),
        ("role", 7, "does not say which family"),
    ],
    ids=str,
)
def test_a_damaged_record_of_an_export_is_a_problem(out, tmp_path, key, value, problem):
    folder = Path(shutil.copytree(out / "student", tmp_path / "student"))
    file = folder / "sampler_spec.json"
    record = json.loads(file.read_text()) | {key: value}
    if value is None:
        del record[key]
    file.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=problem.replace("+", r"\+").replace("?", r"\?")):
        read_sample_source(folder)
