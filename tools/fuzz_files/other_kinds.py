"""More kinds of files: media and what is made of them, exports that are sampled, other families.

See ``kinds`` for what a kind is.
"""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fuzz_files.kinds import (
    TINY,
    Kind,
    SilentDifferenceError,
    core_kinds,
    make_folder,
    require,
)
from fuzz_files.mutations import mutate_bytes, mutate_json, mutate_safetensors, mutate_yaml

# -- media ----------------------------------------------------------------------------------------


def _write_media(folder: Path) -> None:
    from media_files import moving_frames, write_picture, write_tar, write_video

    clips = folder / "clips"
    write_video(clips / "a.mp4", moving_frames(12, 48, 48))
    (clips / "a.txt").write_text("the digit one moving up\nthe digit one\n")
    write_picture(folder / "pictures" / "p.png", moving_frames(1, 48, 48)[0])
    write_picture(folder / "photos" / "p.jpg", moving_frames(1, 48, 48)[0])
    (folder / "prompts.txt").write_text("the digit three\nthe digit four\n")
    (folder / "table.csv").write_text('path,caption\nclips/a.mp4,"one, moving up"\n')
    (folder / "table.jsonl").write_text('{"path": "clips/a.mp4", "caption": ["one", "two"]}\n')
    (folder / "cuts.json").write_text('{"a.mp4": [0.5, 1.0]}')
    content = (clips / "a.mp4").read_bytes()
    (folder / "tars").mkdir()
    write_tar(folder / "tars" / "0.tar", {"a.mp4": content, "a.txt": b"the digit one"})


def _use_media(folder: Path, /, **source: str) -> None:
    """List the items of a source and decode all of their clips."""
    from distill_media import (
        CaptionsConfig,
        ClipShape,
        CutConfig,
        SourceConfig,
        read_clips,
        read_items,
        read_scene_cuts,
    )
    from distill_protocols import DataError

    [(kind, name)] = source.items()
    sources = [SourceConfig(**{kind: str(folder / name)})]
    cuts = read_scene_cuts(folder / "cuts.json")
    shapes = [ClipShape(9, 32, 32), ClipShape(1, 32, 32)]
    for item in read_items(sources, CaptionsConfig(missing="empty")):
        if item.problem is not None:
            raise DataError(item.problem)
        if item.place is None:
            continue
        for clip in read_clips(item, shapes, CutConfig(fps=8.0), scene_cuts=cuts):
            sizes = (clip.shape.frames, clip.shape.height, clip.shape.width, 3)
            require(clip.frames.shape == sizes, f"a clip of {clip.frames.shape}")


# -- a data set in the making ---------------------------------------------------------------------


def _write_units(folder: Path) -> None:
    from media_files import moving_frames, write_video
    from preprocess_requests import write_request

    for number in range(3):
        path = folder / "clips" / f"{number}.mp4"
        write_video(path, moving_frames(12, 48, 48, seed=number))
        path.with_suffix(".txt").write_text("the digit one moving up")
    write_request(folder, output_dir="./data")
    require(_preprocess(folder) == 0, "apps/preprocess failed")
    (folder / "data" / "index.json").unlink()  # what a process that was killed leaves


def _preprocess(folder: Path, *options: str) -> int:
    from distill_preprocess.cli import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(["--config", str(folder / "data.yaml"), *options])


def _use_units(folder: Path) -> None:
    """Go on with the data set, and read all of it if that succeeds."""
    from distill_conditioning import DataConfig, LatentDataset
    from distill_protocols import DataError

    status = _preprocess(folder)
    if status:
        raise DataError(f"status {status}")
    dataset = LatentDataset(DataConfig(path=str(folder / "data"), verify="full"))
    require(len(dataset) == 3, f"{len(dataset)} samples of 3 clips")
    dataset.read(torch.arange(3))


def _use_request(folder: Path) -> None:
    from distill_protocols import DataError

    status = _preprocess(folder, "--dry-run")
    if status:
        raise DataError(f"status {status}")


# -- other families, and exports that are sampled -------------------------------------------------


def _write_export(folder: Path) -> None:
    from distill_adapters_wan import PLUGIN, WanPipelineConfig
    from distill_protocols import ExportRequest, RoleSpec, SamplerSpec

    path = str(TINY / "wan")
    config = WanPipelineConfig(num_frames=9, height=32, width=32, max_sequence_length=8)
    role = RoleSpec(name="student", path=path, trainable=True)
    request = ExportRequest(sampler=SamplerSpec(steps=2, timesteps=(1000.0, 700.0)))
    exporter = PLUGIN.exporter(config, source=path)
    exporter.export(role, PLUGIN.weights(path), folder / "student", request)


def _use_sampled(folder: Path) -> None:
    """Sample an export as apps/sample does."""
    from distill_sample import open_model

    clips = open_model(folder / "student", device="cpu").sample(["the digit one"])
    require(bool(torch.isfinite(clips).all()), "a clip that is not finite")


def _write_ltx(folder: Path) -> None:
    import ltx_pipelines

    ltx_pipelines.build(folder / "model")


def _write_sd3(folder: Path) -> None:
    import sd3_pipelines

    sd3_pipelines.build(folder / "model")


def _ltx() -> tuple[Any, Any]:
    from distill_adapters_ltx import PLUGIN, LTXPipelineConfig

    return PLUGIN, LTXPipelineConfig(
        num_frames=17, height=64, width=96, frame_rate=24, max_sequence_length=8
    )


def _sd3() -> tuple[Any, Any]:
    import sd3_pipelines

    return sd3_pipelines.family()


def _use_family(folder: Path, family: Any) -> None:
    """Check and plan a role on a model, then load it, call it and export it."""
    from distill_protocols import ExportRequest, RoleSpec, SamplerSpec

    plugin, config = family()
    path = str(folder / "model")
    role = RoleSpec(name="student", path=path, trainable=True)
    problems = [
        *plugin.role_problems(role, config),
        *plugin.config_problems(config, ["student"]),
    ]
    plugin.condition_shapes(config, source=path)
    plugin.latent_shape(config, source=path)
    plugin.latent_tokens(config, source=path)
    plugin.frame_rate(config, source=path)
    plugin.fingerprint(config, source=path)
    if not problems:
        plugin.plan(role, config)
        plugin.plan_call(role, config, source=path, batch=1)
    adapter = plugin.adapter(
        plugin.load([role], config, device=torch.device("cpu")), config, source=path
    )
    latents = torch.zeros(1, *adapter.latent_shape)
    adapter.forward(
        "student", latents, torch.tensor([500.0]), adapter.encode_condition(["a seven"])
    )
    adapter.decode(latents)
    target = Path(tempfile.mkdtemp(prefix="fuzz-")) / "export"
    try:
        plugin.exporter(config, source=path).export(
            role, plugin.weights(path), target, ExportRequest(sampler=SamplerSpec(steps=2))
        )
    finally:
        shutil.rmtree(target.parent, ignore_errors=True)
    if problems:
        raise SilentDifferenceError(f"used in spite of {problems[:1]}")


# -- all ------------------------------------------------------------------------------------------


def all_kinds() -> list[Kind]:
    """Return every kind of file that a run, an export, a migration or a data set reads."""
    return [*core_kinds(), *_other_kinds()]


def _other_kinds() -> Iterator[Kind]:
    media, units, export = map(make_folder, (_write_media, _write_units, _write_export))
    files: list[tuple[str, str, Any, dict[str, str]]] = [
        ("video", "clips/a.mp4", mutate_bytes, {"folder": "clips"}),
        ("caption", "clips/a.txt", mutate_bytes, {"folder": "clips"}),
        ("PNG", "pictures/p.png", mutate_bytes, {"folder": "pictures"}),
        ("JPEG", "photos/p.jpg", mutate_bytes, {"folder": "photos"}),
        ("CSV table", "table.csv", mutate_bytes, {"table": "table.csv"}),
        ("JSONL table", "table.jsonl", mutate_bytes, {"table": "table.jsonl"}),
        ("tar", "tars/0.tar", mutate_bytes, {"tars": "tars"}),
        ("prompts", "prompts.txt", mutate_bytes, {"prompts": "prompts.txt"}),
        ("scene cuts", "cuts.json", mutate_json, {"folder": "clips"}),
    ]
    for name, file, mutate, source in files:
        use = functools.partial(_use_media, **source)
        yield Kind(name=f"media: {name}", template=media, file=file, mutate=mutate, use=use)
    for name, file in (
        ("unit record", "data/unit-00001.json"),
        ("items", "data/items-000.json"),
        ("settings", "data/preparation.json"),
    ):
        yield Kind(
            name=f"preprocess: {name}", template=units, file=file, mutate=mutate_json,
            use=_use_units,
        )  # fmt: skip
    yield Kind(
        name="preprocess: shard of a unit", template=units, file="data/shard-00001.safetensors",
        mutate=mutate_safetensors, use=_use_units,
    )  # fmt: skip
    yield Kind(
        name="preprocess: data.yaml", template=units, file="data.yaml", mutate=mutate_yaml,
        use=_use_request,
    )  # fmt: skip
    for name in ("sampler_spec.json", "model_index.json"):
        yield Kind(
            name=f"sampled export: {name}", template=export, file=f"student/{name}",
            mutate=mutate_json, use=_use_sampled,
        )  # fmt: skip
    stem = "diffusion_pytorch_model.safetensors"
    for name, write, family in (("LTX", _write_ltx, _ltx), ("SD 3", _write_sd3, _sd3)):
        template = make_folder(write)
        use = functools.partial(_use_family, family=family)
        for file, mutate in (
            ("model_index.json", mutate_json),
            ("transformer/config.json", mutate_json),
            (f"transformer/{stem}", mutate_safetensors),
            ("vae/config.json", mutate_json),
            (f"vae/{stem}", mutate_safetensors),
            ("scheduler/scheduler_config.json", mutate_json),
            ("text_encoder/config.json", mutate_json),
            ("tokenizer/tokenizer_config.json", mutate_json),
        ):
            yield Kind(
                name=f"{name}: {file}", template=template, file=f"model/{file}", mutate=mutate,
                use=use,
            )  # fmt: skip
