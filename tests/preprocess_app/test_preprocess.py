"""From files to a data set: what is made, what is said of the rest, and that kills lose nothing."""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_adapters_wan.adapter import WanAdapter
from distill_conditioning import DataConfig, LatentDataset, SampleShape, dataset_info
from distill_preprocess import run as preprocessing
from distill_preprocess.cli import main
from distill_preprocess.encoding import Encoder
from distill_protocols import ModelBundle
from distill_runfile.cli import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USAGE
from media_files import (
    moving_frames,
    quarters,
    set_matrix,
    write_audio,
    write_picture,
    write_video,
)
from preprocess_requests import PIPELINE, TINY, write_request
from transformers import UMT5EncoderModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


CAPTIONS = ["the digit one moving up", "the digit two moving left"]


def write_clips(folder: Path, count: int, *, first: int = 0) -> None:
    for number in range(first, first + count):
        path = folder / "clips" / f"clip-{number:02d}.mp4"
        write_video(path, moving_frames(12, 48, 48, seed=number))
        path.with_suffix(".txt").write_text(CAPTIONS[number % 2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder of seven clips and the data set that is made of them at one go."""
    folder = tmp_path_factory.mktemp("whole")
    write_clips(folder, 7)
    assert main(["--config", str(write_request(folder))]) == EXIT_OK
    return folder


@pytest.fixture
def begun(whole, tmp_path) -> Path:
    """The same clips, and nothing made of them."""
    (tmp_path / "clips").symlink_to(whole / "clips")
    write_request(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def report(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "report.jsonl").read_text().splitlines()
    return {line["id"]: line for line in map(json.loads, lines)}


# -- what is made ---------------------------------------------------------------------------------


def test_samples_are_the_clips_through_vae_and_encoder(whole):
    dataset = LatentDataset(DataConfig(path=str(whole / "data"), verify="full"))
    assert len(dataset) == 7
    assert [dataset.id(n) for n in range(7)] == [f"clip-{n:02d}.mp4" for n in range(7)]
    config = WanPipelineConfig(**PIPELINE)
    source = str(TINY / "wan")
    adapter = PLUGIN.adapter(ModelBundle({}), config, source=source)
    batch = dataset.read(torch.arange(7))
    text = adapter.encode_condition(CAPTIONS).tensors["text"]
    for number in range(7):
        assert torch.equal(batch.cond.tensors["text"][number], text[number % 2])
    video = torch.from_numpy(moving_frames(12, 48, 48, seed=3)).permute(3, 0, 1, 2)[None] / 255
    small = torch.nn.functional.interpolate(video[0, :, :9], size=(32, 32), mode="area")[None]
    expected = adapter.encode(small)[0]
    error = (batch.latents[3] - expected).square().mean() / expected.square().mean()
    assert error < 0.1  # another scaling, and H.264
    stored = dataset.negative()
    assert stored is not None
    assert stored.prompt == ""
    fingerprint = PLUGIN.fingerprint(config, source=source)
    info = dataset_info(
        whole / "data",
        shapes=[
            SampleShape(
                latents=adapter.latent_shape,
                conditions=PLUGIN.condition_shapes(config, source=source),
            )
        ],
        fingerprint=fingerprint,
    )
    assert info.problems == ()


def test_files_may_be_read_by_whoever_the_umask_lets(whole):
    mask = os.umask(0)
    os.umask(mask)
    for file in (whole / "data").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file.name


def test_a_finished_data_set_is_left_alone(whole, caplog):
    before = {f.name: f.stat().st_mtime_ns for f in (whole / "data").iterdir()}
    assert main(["--config", str(whole / "data.yaml")]) == EXIT_OK
    assert "nothing to do" in caplog.text
    assert before == {f.name: f.stat().st_mtime_ns for f in (whole / "data").iterdir()}


def test_windows_pictures_several_captions_and_a_cache(tmp_path, capsys):
    write_video(tmp_path / "clips/long.mp4", moving_frames(30, 48, 48))
    (tmp_path / "clips/long.txt").write_text("the digit one\nthe digit two")
    write_video(tmp_path / "clips/b.mp4", moving_frames(9, 48, 48, seed=2))
    (tmp_path / "clips/b.txt").write_text("the digit two")
    sources = [{"folder": "./clips", "caption_lines": True, "name": "mine"}]
    file = write_request(
        tmp_path, sources=sources, cache="./texts", clips={"fps": 8, "take": "windows"},
        captions={"prefix": "the "},
    )  # fmt: skip
    assert main(["--config", str(file)]) == EXIT_OK
    dataset = LatentDataset(DataConfig(path=str(tmp_path / "data")))
    names = ["mine/b.mp4", "mine/long.mp4", "mine/long.mp4#2", "mine/long.mp4#3"]
    assert [dataset.id(n) for n in range(4)] == names
    metadata = (tmp_path / "data/shard-00000.safetensors").read_bytes()
    assert b"the the digit one" in metadata
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "texts").iterdir()}
    assert len(kept) == 2
    values = yaml.safe_load(file.read_text())
    values["preprocess"]["output_dir"] = "./other"
    file.write_text(yaml.safe_dump(values))
    assert main(["--config", str(file)]) == EXIT_OK
    assert kept == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "texts").iterdir()}
    assert contents(tmp_path / "other") == contents(tmp_path / "data")


def test_videos_and_pictures_go_into_the_buckets_of_the_model(tmp_path, capsys):
    write_video(tmp_path / "clips/wide.mp4", moving_frames(12, 48, 96))
    write_video(tmp_path / "clips/high.mp4", moving_frames(12, 96, 48))
    write_video(tmp_path / "clips/short.mp4", moving_frames(6, 48, 96))
    write_picture(tmp_path / "clips/picture.png", moving_frames(1, 48, 96)[0])
    file = write_request(tmp_path, captions={"missing": "empty"}, items_per_unit=3)
    values = yaml.safe_load(file.read_text())
    sizes = [(9, 32, 64), (9, 64, 32), (5, 64, 32), (1, 32, 64)]
    values["pipeline_config"] = {
        "max_sequence_length": 8,
        "buckets": [{"num_frames": f, "height": h, "width": w} for f, h, w in sizes],
    }  # fmt: skip
    file.write_text(yaml.safe_dump(values))
    assert main(["--config", str(file), "--dry-run"]) == EXIT_OK
    said = capsys.readouterr().out
    counts = "1 of 9 x 32 x 64, 1 of 9 x 64 x 32, 2 of 1 x 32 x 64"
    assert f"all were looked into; clips: {counts}\n" in said
    assert "no clip falls into 5 x 64 x 32. Add clips" in said
    assert main(["--config", str(file)]) == EXIT_OK
    dataset = LatentDataset(DataConfig(path=str(tmp_path / "data"), verify="full"))
    found = {}
    for number in range(len(dataset)):
        found[dataset.id(number)] = tuple(dataset.read(torch.tensor([number])).latents.shape[2:])
    assert found == {
        "high.mp4": (3, 8, 4), "wide.mp4": (3, 4, 8), "short.mp4": (1, 4, 8),
        "picture.png": (1, 4, 8),
    }  # fmt: skip


def test_prompts_alone_become_captions_alone(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("the digit one moving up\n\nthe digit two moving up\n" * 2)
    file = write_request(tmp_path, sources=[{"prompts": "./p.txt"}])
    assert main(["--config", str(file), "--dry-run"]) == EXIT_OK
    assert "captions alone" in capsys.readouterr().out
    assert main(["--config", str(file)]) == EXIT_OK
    info = dataset_info(tmp_path / "data")
    assert (info.problems, info.samples) == ((), 4)
    assert info.index is not None
    assert not info.index.has_latents


def test_different_captions_of_one_embedding_are_counted_and_named(tmp_path, caplog):
    ends = ["fox", "hare"]
    start = "the digit one moving up the digit two moving up"
    (tmp_path / "p.txt").write_text("\n".join(f"{start} {end}" for end in ends))
    assert (
        main(["--config", str(write_request(tmp_path, sources=[{"prompts": "./p.txt"}]))])
        == EXIT_OK
    )
    assert "2 different captions share 1 embedding:" in caplog.text
    assert all(repr(f"{start} {end}") in caplog.text for end in ends)
    notes = report(tmp_path / "data")["p.txt:1"]["notes"]
    assert "and the encoder reads 8" in notes[0]


# -- bad files ------------------------------------------------------------------------------------


def truncated(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def written(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


FRAMES = moving_frames(12, 48, 48)
ALPHA = np.concatenate([FRAMES, np.full((12, 48, 48, 1), 200, np.uint8)], axis=3)

BAD = {
    "truncated.mp4": (lambda p: truncated(write_video(p, FRAMES), 0.5), "no video that can be"),
    "empty.mp4": (lambda p: written(p, b""), "it is empty"),
    "empty.jpg": (lambda p: written(p, b""), "it is empty"),
    "not-a-video.mp4": (lambda p: written(p, b"hello " * 99), "no video that can be read"),
    "not-a-picture.png": (lambda p: written(p, b"hello " * 99), "no picture that can be read"),
    "playlist.mp4": (lambda p: written(p, b"#EXTM3U\n/etc/passwd\n"), "no video that can be read"),
    "audio.mp4": (write_audio, "it has no video"),
    "zero-frames.mkv": (lambda p: truncated(write_video(p, FRAMES), 0.05), "no video|no frame"),
    "picture.jpg": (lambda p: write_picture(p, FRAMES[0]), "it has 1 frame at the rate"),
    "short.mp4": (lambda p: write_video(p, FRAMES[:8]), "it has 8 frames at the rate"),
    "small.mp4": (lambda p: write_video(p, FRAMES[:, :24, :24]), "smaller than every bucket"),
    "huge.mp4": (lambda p: write_video(p, moving_frames(9, 640, 640)), "640 x 640, more than"),
    "half.png": (lambda p: truncated(write_picture(p, FRAMES[0]), 0.5), "it is damaged|1 frame"),
    "no-caption.mp4": (lambda p: write_video(p, FRAMES), "it has no caption"),
    "bad-caption.mp4": (lambda p: write_video(p, FRAMES), "no UTF-8 text"),
}
GOOD = {
    "odd.mkv": lambda p: write_video(p, moving_frames(12, 49, 51), codec="ffv1", pix_fmt="yuv444p"),
    "rotated.mp4": lambda p: set_matrix(write_video(p, quarters(12, 48, 64)), 90),
    "variable.mkv": lambda p: write_video(
        p, FRAMES, times=[0, 0.1, 0.3, 0.35, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4]
    ),
    "ten-bit.mkv": lambda p: write_video(p, FRAMES, codec="ffv1", pix_fmt="yuv420p10le"),
    "alpha.mov": lambda p: write_video(
        p, ALPHA, codec="qtrle", pix_fmt="argb", source_format="rgba"
    ),
    "with sound.mp4": lambda p: write_video(p, FRAMES, audio=True),
    "fox 🦊.mp4": lambda p: write_video(p, FRAMES),
    "two\nlines.mp4": lambda p: write_video(p, FRAMES),
    "bom.mp4": lambda p: write_video(p, FRAMES),
}


def write_all(folder: Path) -> None:
    for name, make in {**{n: m for n, (m, _) in BAD.items()}, **GOOD}.items():
        path = folder / "clips" / name
        path.parent.mkdir(exist_ok=True)
        make(path)
        if name != "no-caption.mp4":
            path.with_name(path.stem + ".txt").write_text("the digit one")
    (folder / "clips/bad-caption.txt").write_bytes(b"\xff\xfa\x00")
    (folder / "clips/bom.txt").write_bytes(b"\xef\xbb\xbfthe digit one\r\n")
    (folder / "clips/quoted.csv").write_text("nothing reads this")


def test_two_dozen_files_each_get_their_line_or_their_sample(tmp_path, caplog):
    write_all(tmp_path)
    file = write_request(tmp_path, clips={"fps": 8, "max_pixels": 300_000}, items_per_unit=5)
    assert main(["--config", str(file)]) == EXIT_OK
    dataset = LatentDataset(DataConfig(path=str(tmp_path / "data"), verify="full"))
    assert sorted(dataset.id(n) for n in range(len(dataset))) == sorted(GOOD)
    lines = report(tmp_path / "data")
    assert {n for n, line in lines.items() if "skipped" in line} == set(BAD)
    for name, (_, reason) in BAD.items():
        skipped = lines[name]["skipped"]
        assert any(part in skipped for part in reason.split("|")), (name, skipped)
    assert "transparent" in lines["alpha.mov"]["notes"][0]
    assert f"{len(BAD)} skipped, each with its reason in report.jsonl" in caplog.text
    shown = [message for message in caplog.messages if message.startswith("skipped ")]
    assert sorted(message.split()[1].rstrip(":") for message in shown) == sorted(BAD)
    assert "what else is skipped" not in caplog.text


def test_strict_stops_at_the_first(tmp_path, capsys):
    write_clips(tmp_path, 3)
    (tmp_path / "clips/clip-01.mp4").write_bytes(b"")
    assert main(["--config", str(write_request(tmp_path)), "--strict"]) == EXIT_FAILED
    assert "MediaError: clip-01.mp4: it is empty" in capsys.readouterr().err
    assert not (tmp_path / "data/index.json").exists()


def test_a_data_set_of_bad_files_alone_is_none(tmp_path, capsys):
    written(tmp_path / "clips/a.mp4", b"")
    assert (
        main(["--config", str(write_request(tmp_path, captions={"missing": "empty"}))])
        == EXIT_FAILED
    )
    assert "no sample could be made of 1 items" in capsys.readouterr().err
    assert report(tmp_path / "data")["a.mp4"]["skipped"].startswith("it is empty")


# -- stopped, killed, continued, extended ---------------------------------------------------------


def test_a_killed_process_goes_on_and_the_end_is_the_same_byte_for_byte(whole, begun):
    command = [sys.executable, str(ROOT / "apps/preprocess"), "--config", str(begun / "data.yaml")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    deadline = time.monotonic() + 300
    while not list((begun / "data").glob("unit-*.json")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    first = begun / "data/shard-00000.safetensors"
    kept = first.stat().st_mtime_ns
    assert main(command[2:]) == EXIT_OK
    assert first.stat().st_mtime_ns == kept
    assert contents(begun / "data") == contents(whole / "data")


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_stop_on_request_keeps_finished_units(whole, begun, monkeypatch, capsys, kind):
    encode, calls = Encoder.encode_clips, []

    def stop(encoder, clips):
        calls.append(clips)
        if len(calls) == 3:
            os.kill(os.getpid(), kind)
        return encode(encoder, clips)

    monkeypatch.setattr(Encoder, "encode_clips", stop)
    # A shell that starts the tests in the background has SIGINT ignored.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["--config", str(begun / "data.yaml")]) == EXIT_STOPPED
    finally:
        signal.signal(signal.SIGINT, former)
    assert "stopped: 2 finished units are" in capsys.readouterr().out
    assert main(["--config", str(begun / "data.yaml")]) == EXIT_OK
    assert len(calls) == 3 + 2
    assert contents(begun / "data") == contents(whole / "data")


def test_captions_come_first_and_the_text_encoder_is_gone_before_a_clip_is_encoded(
    whole, begun, monkeypatch
):
    def text_encoders() -> set[int]:
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if type(thing) is UMT5EncoderModel}

    before, seen, encode = text_encoders(), [], Encoder.encode_clips

    def watch(self, clips):
        seen.append(text_encoders() - before)
        return encode(self, clips)

    monkeypatch.setattr(Encoder, "encode_clips", watch)
    assert main(["--config", str(begun / "data.yaml")]) == EXIT_OK
    assert seen == [set()] * 4
    assert contents(begun / "data") == contents(whole / "data")


def test_captions_that_are_encoded_are_kept_over_a_stop(whole, begun, monkeypatch):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    encoded, encode = [], WanAdapter.encode_condition

    def watch(self, texts, *more):
        encoded.extend(text for text in texts if text)  # without the negative prompt
        return encode(self, texts, *more)

    monkeypatch.setattr(WanAdapter, "encode_condition", watch)
    file = begun / "data.yaml"
    values = yaml.safe_load(file.read_text())
    for precision in ("bf16", "fp32"):  # another encoder's captions are not taken
        values["pipeline_config"]["text_encoder_precision"] = precision
        file.write_text(yaml.safe_dump(values))
        with monkeypatch.context() as stopping:
            stopping.setattr(preprocessing, "decode_ahead", stop)
            assert main(["--config", str(file)]) == EXIT_STOPPED
        assert set(encoded) == set(CAPTIONS)
        encoded.clear()
    assert len(list((begun / "data").glob(".captions-*"))) == 2 * 4  # units
    # What a kill leaves behind of a file that is being written.
    (begun / "data" / "..captions-00000-0.1.part.safetensors").touch()
    assert main(["--config", str(begun / "data.yaml")]) == EXIT_OK
    assert not encoded
    assert contents(begun / "data") == contents(whole / "data")


def test_processes_share_the_units(whole, begun, monkeypatch):
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["--config", str(begun / "data.yaml")]) == EXIT_OK
        assert (begun / "data/index.json").exists() == (rank == 0)
    assert contents(begun / "data") == contents(whole / "data")


def test_a_data_set_grows_and_what_was_there_stays(tmp_path, capsys, caplog):
    write_clips(tmp_path, 3)
    file = str(write_request(tmp_path))
    assert main(["--config", file, "--limit", "2"]) == EXIT_OK
    assert main(["--config", file]) == EXIT_FAILED
    assert "there are 1 new ones ('clip-02.mp4')" in capsys.readouterr().err
    assert main(["--config", file, "--add"]) == EXIT_OK
    write_clips(tmp_path, 2, first=3)
    (tmp_path / "clips/clip-00b.mp4").write_bytes((tmp_path / "clips/clip-00.mp4").read_bytes())
    (tmp_path / "clips/clip-00b.txt").write_text("the digit one")
    kept = {f.name: f.read_bytes() for f in (tmp_path / "data").glob("shard-*")}
    assert main(["--config", file, "--add"]) == EXIT_OK
    after = contents(tmp_path / "data")
    assert kept.items() <= after.items()
    dataset = LatentDataset(DataConfig(path=str(tmp_path / "data"), verify="full"))
    names = [dataset.id(n).removesuffix(".mp4") for n in range(len(dataset))]
    assert names == ["clip-00", "clip-01", "clip-02", "clip-00b", "clip-03", "clip-04"]
    assert main(["--config", file]) == EXIT_OK
    assert "nothing to do" in caplog.text


def test_other_settings_and_other_items_are_refused(begun, capsys):
    assert main(["--config", str(begun / "data.yaml"), "--limit", "2"]) == EXIT_OK
    assert main(["--config", str(write_request(begun, clips={"fps": 4}))]) == EXIT_FAILED
    assert "clips.fps was 8" in capsys.readouterr().err
    write_request(begun)
    changed = begun / "other"
    changed.mkdir()
    for file in (begun / "clips").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "clip-00.txt").write_text("the digit nine")
    (begun / "clips").unlink()
    changed.rename(begun / "clips")
    arguments = ["--config", str(begun / "data.yaml"), "--limit", "2"]
    assert main(arguments) == EXIT_FAILED
    assert "items have changed since it was begun ('clip-00.mp4')" in capsys.readouterr().err
    for file in (begun / "clips").glob("clip-00*"):
        file.unlink()
    assert main(arguments) == EXIT_FAILED
    assert "items that are gone ('clip-00.mp4')" in capsys.readouterr().err


def test_a_unit_whose_shard_is_gone_or_torn_is_made_again(whole, begun):
    assert main(["--config", str(begun / "data.yaml")]) == EXIT_OK
    shards = sorted((begun / "data").glob("shard-*"))
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-7])
    assert main(["--config", str(begun / "data.yaml")]) == EXIT_OK
    assert contents(begun / "data") == contents(whole / "data")


def test_other_weights_half_way_are_refused(begun, monkeypatch, capsys):
    config = str(begun / "data.yaml")
    assert main(["--config", config, "--limit", "2"]) == EXIT_OK
    adapter_of = preprocessing.make_adapter

    def other(*given):
        adapter = adapter_of(*given)
        own = adapter.latent_fingerprint()
        monkeypatch.setattr(adapter, "latent_fingerprint", lambda: {**own, "vae.weights": "others"})
        return adapter

    monkeypatch.setattr(preprocessing, "make_adapter", other)
    assert main(["--config", config, "--add"]) == EXIT_FAILED
    assert "vae.weights was" in capsys.readouterr().err


# -- the file -------------------------------------------------------------------------------------


def test_every_problem_of_the_file_with_its_line(tmp_path, capsys):
    file = tmp_path / "data.yaml"
    file.write_text(
        "recipe: {family: wam}\n"
        "models: {teacher: {path: ./gone}}\n"
        "pipeline_config: {num_frames: 9, height: 32, width: 32}\n"
        "preprocess:\n"
        "  output_dir: ./data\n"
        "  sources:\n"
        "    - {folder: ./clips, tabel: x}\n"
        "    - {folder: ./a, table: ./b}\n"
        "  clips: {take: uniform, fps: quick}\n"
        "  batchsize: 3\n"
        "training: {}\n"
    )
    assert main(["--config", str(file)]) == EXIT_USAGE
    err = capsys.readouterr().err
    for place in (
        "1: recipe.family", "7: preprocess.sources.0.tabel", "8: preprocess.sources.1",
        "9: preprocess.clips.fps", "10: preprocess.batchsize", "11: training",
    ):  # fmt: skip
        assert f"data.yaml:{place}" in err, (place, err)
    assert "nothing was made" in err


def test_problems_of_what_is_not_there(tmp_path, capsys):
    sources = [{"folder": "./gone"}, {"table": "./gone.csv"}]
    file = write_request(tmp_path, sources=sources, clips={"scene_cuts": "./cuts.json"})
    assert main(["--config", str(file)]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert err.count("there is no ") == 3
    mixed = write_request(tmp_path, sources=[{"folder": "./gone"}, {"prompts": "./p"}])
    assert main(["--config", str(mixed)]) == EXIT_USAGE
    assert "prompts stand beside others" in capsys.readouterr().err


def test_sections_of_a_run_file_are_used_with_their_own_lines(whole, tmp_path, capsys):
    values = {
        "run_file": str(TINY / "finetune.yaml"), "output_dir": "./data",
        "sources": [{"folder": str(whole / "clips")}], "clips": {"fps": 8},
        "items_per_unit": 2, "batch_size": 2, "latent_dtype": "float32", "cpu_threads": 1,
        "device": "cpu",
    }  # fmt: skip
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump({"preprocess": values}))
    assert main(["--config", str(file)]) == EXIT_OK
    shards = {name: content for name, content in contents(tmp_path / "data").items()
              if name.startswith("shard")}  # fmt: skip
    assert shards.items() <= contents(whole / "data").items()
    run_file = tmp_path / "run.yaml"
    run_file.write_text("recipe: {family: wan, method: dmd2}\n\nmodels: {student: {paht: x}}\n")
    values["run_file"] = "./run.yaml"
    file.write_text(yaml.safe_dump({"preprocess": values}))
    assert main(["--config", str(file)]) == EXIT_USAGE
    assert "run.yaml:3: models.student.paht" in capsys.readouterr().err
    values["run_file"] = "./gone.yaml"
    file.write_text(yaml.safe_dump({"preprocess": values}))
    assert main(["--config", str(file)]) == EXIT_USAGE
    assert "there is no file" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(begun, capsys):
    assert main(["--config", str(begun / "data.yaml"), "--dry-run", "--limit", "5"]) == EXIT_OK
    out = capsys.readouterr().out
    assert "clips of 9 x 32 x 32 (frames x height x width), 8 frames a second, head" in out
    assert "5 items, " in out
    assert "; 0 cannot be used as they are listed" in out
    assert "clips: 5 of 9 x 32 x 32\n" in out
    assert "3 units of 2 items" in out
    assert not (begun / "data").exists()


def test_a_second_start_is_refused_while_one_is_writing(begun, capsys):
    from distill_runtime import claim_folder

    with claim_folder(begun / "data", "worker-0"):
        assert main(["--config", str(begun / "data.yaml")]) == EXIT_FAILED
    assert "another process is writing there" in capsys.readouterr().err


def test_several_negative_prompts_are_stored_and_found_by_their_texts(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the digit one\n")
    file = write_request(tmp_path, sources=[{"prompts": "./prompts.txt"}])
    values = yaml.safe_load(file.read_text())
    texts = ["", "the digit two", "moving up"]
    values["conditioning"] = {"negative_prompt": "", "more_negative_prompts": texts[1:]}
    file.write_text(yaml.safe_dump(values))
    assert main(["--config", str(file)]) == EXIT_OK
    dataset = LatentDataset(DataConfig(path=str(tmp_path / "data")))
    adapter = PLUGIN.adapter(
        ModelBundle({}), WanPipelineConfig(**PIPELINE), source=str(TINY / "wan")
    )
    for text in texts:
        stored = dataset.negative(text)
        assert stored is not None
        expected = adapter.encode_neg_condition(text).tensors["text"]
        assert torch.equal(stored.condition.tensors["text"], expected)
    assert dataset.negative().prompt == ""
    assert dataset.negative("moving down") is None
    assert dataset_info(tmp_path / "data").problems == ()
    values["conditioning"]["more_negative_prompts"] = texts[2:]
    file.write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main(["--config", str(file)]) == EXIT_FAILED
    assert "more_negative_prompts was" in capsys.readouterr().err
