"""Random run files on tiny Wan pipelines, and what must hold of each that the check accepts.

A drawn file is read as a user's is. If the check refuses it, that is an answer, and its problems
are kept. If it accepts it, the run must go to its end, and one that is stopped on the way and
started again must leave the same files: checkpoint, exports, validation clips and metrics.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from attrs import field, frozen
from distill_adapters_wan import PLUGIN, CausalConfig, WanPipelineConfig
from distill_conditioning import (
    DataConfig,
    LatentDataset,
    ShardRows,
    ShardWriter,
    TrajectoryFolder,
    preprocess,
)
from distill_protocols import ConfigError, ModelBundle
from distill_runfile import RunConfig
from distill_runfile.read import read_config
from distill_train.build import build
from PIL import Image
from tiny_run import one_process
from wan_variants import VARIANTS
from wan_variants import build as build_variant
from wan_variants import template as build_template

STEPS = 4
PROMPT = "a seven moving left"
STOCHASTIC = {"steps": 2, "timesteps": [1000, 700], "stochastic": True}
METHODS: dict[str, tuple[str, ...]] = {
    "finetune": (),
    "teacher_only": ("teacher",),
    "kd": (),
    "consistency": ("teacher",),
    "dmd2": ("teacher", "critic"),
    "self_forcing": ("teacher", "critic"),
    "causvid": ("teacher", "critic"),
    "rcm": ("teacher", "critic"),
    "ladd": ("teacher", "discriminator"),
}
"""Name -> roles besides the student."""
MATCHING = ("dmd2", "self_forcing", "causvid", "rcm")
CAUSAL = ("self_forcing", "causvid")


@frozen(eq=False)
class Folders:
    """Pipelines, data sets and trajectories, each made when it is first drawn."""

    root: Path

    def pipeline(self, variant: str) -> Path:
        template, folder = self.root / "template", self.root / variant
        if not template.exists():
            build_template(template)
        return folder if folder.exists() else build_variant(variant, template, folder)

    def data(self, variant: str) -> Path:
        folder = self.root / f"{variant}-data"
        if not folder.exists():
            kind, path = VARIANTS[variant], str(self.pipeline(variant))
            adapter = PLUGIN.adapter(ModelBundle({}), kind.config, source=path)
            with ShardWriter(folder) as writer:
                preprocess(_clips(), adapter, writer, negative_prompt="", first_frames=kind.image)
        return folder

    def trajectories(self, variant: str) -> Path:
        folder = self.root / f"{variant}-trajectories"
        return folder if folder.exists() else write_trajectories(self.data(variant), folder)

    def picture(self) -> Path:
        file = self.root / "first.png"
        if not file.exists():
            Image.new("RGB", (48, 32), (200, 40, 90)).save(file)
        return file


def _clips() -> Iterator[tuple[str, str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        yield f"clip-{i}", PROMPT, torch.rand(3, 9, 32, 48, generator=generator)


def write_trajectories(data: Path, folder: Path, *, samples: int = 6) -> Path:
    """Write trajectories at the levels of ``STOCHASTIC`` that lead nowhere in particular."""
    source = LatentDataset(DataConfig(path=str(data)))
    trajectories = TrajectoryFolder(
        folder, settings={}, times=(1000.0, 700.0), samples=samples, samples_per_shard=4,
        ids=str, dtype="float16",
    )  # fmt: skip
    for shard in trajectories.missing():
        rows, numbers = ShardRows(), trajectories.span(shard)
        batch = source.read(torch.tensor(numbers))
        states = batch.latents[:, None] * torch.tensor([0.1, 0.5]).view(1, 2, 1, 1, 1, 1)
        captions = [source.caption(number) for number in numbers]
        trajectories.add(rows, numbers, captions, batch.cond, batch.latents, states)
        trajectories.write(shard, rows)
    stored = source.negative()
    negative = None if stored is None else (stored.prompt, stored.condition)
    trajectories.finish(negative=negative, fingerprint=source.computed_by)
    return folder


# -- drawing --------------------------------------------------------------------------------------


def draw(seed: int, folders: Folders) -> dict[str, Any]:
    """Draw the values of a run file without its ``training.output_dir``."""
    draws = random.Random(seed)

    def chance(share: float) -> bool:
        return draws.random() < share

    method = draws.choice(sorted(METHODS))
    variant = draws.choice([name for name, kind in sorted(VARIANTS.items()) if not kind.pair])
    kind, path = VARIANTS[variant], str(folders.pipeline(variant))
    causal = method in CAUSAL or (method in ("finetune", "kd") and chance(0.4))
    models: dict[str, dict[str, Any]] = {"student": _model(draws, path, trained=True)}
    for role in METHODS[method]:
        if role != "discriminator":
            models[role] = _model(draws, path, trained=role != "teacher")
    if "discriminator" in METHODS[method] or (method in ("dmd2", "rcm") and chance(0.2)):
        heads = {"on": "teacher", "blocks": draws.choice([[0], [0, 1]]), "width": 8}
        models["discriminator"] = {"heads": heads}
    for role in ("student", "critic"):
        if role in models and "teacher" in models and chance(0.2):
            lora = models[role].get("lora", {"rank": 2})
            models[role] = {"base": "teacher", "lora": lora}
    one_expert = random.Random(f"experts {seed}")  # so that older seeds draw what they did
    if kind.experts == 2 and one_expert.random() < 0.3:
        expert = one_expert.choice(kind.modules)
        for name, model in models.items():
            if name != "discriminator" and (name != "teacher" or one_expert.random() < 0.5):
                model["experts"] = [expert]
    accumulation, batch = draws.choice([1, 2]), draws.choice([1, 2])
    ema = chance(0.7)
    lora = "lora" in models["student"]
    trained = [name for name in models if name != "teacher"]
    averaged = [name for name in trained if name != "discriminator"]
    values = {
        "recipe": {"family": "wan", "method": method},
        "models": models,
        "training": {
            "max_train_steps": STEPS, "progress": False, "seed": draws.randrange(1000),
            "trackers": ["jsonl"], "log_every": draws.choice([1, 2]),
            "global_batch_size": accumulation * batch, "batch_size_per_device": batch,
            "optimizer": {
                "lr": 1e-3, "betas": [draws.choice([0.0, 0.9]), 0.99],
                "schedule": {
                    "name": draws.choice(["constant", "cosine", "linear"]),
                    "warmup_steps": draws.choice([0, 1]),
                },
            },
        },
        "data": {
            "path": str(folders.trajectories(variant) if method == "kd" else folders.data(variant)),
            "workers": draws.choice([0, 0, 1, 2]),
        },
        "conditioning": {"dropout": 0.0 if method == "kd" else draws.choice([0.0, 0.5])},
        "pipeline_config": _pipeline(draws, kind.config, causal=causal),
        "method_config": _method(draws, method, causal=causal, gan="discriminator" in models),
        "checkpoint": {
            "every_steps": draws.choice([1, 2, 3]), "resume": "latest",
            "async_save": chance(0.5), "keep_last": draws.choice([1, 3]),
            "export": [
                _export(draws, ema=ema and i > 0, lora=lora, number=i)
                for i in range(draws.choice([0, 1, 2]))
            ],
        },
        "callbacks": {"grad_clip": {"max_norm": draws.choice([0.1, 10.0])}}
        | ({"ema": {"roles": averaged, "decay": 0.5, "start_update": draws.choice([0, 1])}}
           if ema else {}),
    }  # fmt: skip
    if chance(0.5):
        views: dict[str, Any] = {"student": {"role": "student"}}
        if ema:
            views["average"] = {"role": "student", "ema": True}
        if "teacher" in models and chance(0.5):
            sampler = {"steps": 2, "shift": 3.0, "guidance": draws.choice([1.0, 2.0])}
            views["teacher"] = {"role": "teacher", "sampler": sampler}
        values["validation"] = {
            "prompts": [PROMPT], "views": views, "every_steps": draws.choice([1, 2, STEPS]),
        }  # fmt: skip
        if kind.image and chance(0.8):
            values["validation"]["images"] = [str(folders.picture())]
    return values


def _model(draws: random.Random, path: str, *, trained: bool) -> dict[str, Any]:
    """Draw how one role is held."""
    model: dict[str, Any] = {
        "path": path,
        "precision": draws.choice(["fp32", "fp32", "bf16", "fp16" if trained else "bf16"]),
    }
    if trained and draws.random() < 0.3:
        model["lora"] = {"rank": draws.choice([1, 3]), "alpha": draws.choice([2.0, 4.0])}
    if draws.random() < 0.3:
        model["activation_checkpointing"] = True
    if draws.random() < 0.1:
        model["compile"] = {"backend": "eager"}
    if draws.random() < (0.02 if trained else 0.3):
        model["offload"] = True
    if draws.random() < 0.1:
        model["attention_backend"] = draws.choice(["native", "_native_math"])
    return model


def _pipeline(draws: random.Random, config: WanPipelineConfig, *, causal: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_frames": config.num_frames, "height": config.height, "width": config.width,
        "max_sequence_length": config.max_sequence_length,
    }  # fmt: skip
    if causal:
        options = {"chunk_frames": draws.choice([1, 2, 3])}
        if draws.random() < 0.3:
            options["first_frame_alone"] = True
        if draws.random() < 0.3:
            options["window_frames"] = 2
        assert options.keys() <= {f.name for f in CausalConfig.__attrs_attrs__}
        values["causal"] = {"roles": ["student"], **options}
    return values


def _method(draws: random.Random, method: str, *, causal: bool, gan: bool) -> dict[str, Any]:
    if method == "finetune":
        past = {"times": draws.choice(["per_clip", "per_chunk"]),
                "past": draws.choice(["noisy", "clean"])} if causal else {}  # fmt: skip
        return {
            "student_sampler": {"steps": 2, "guidance": draws.choice([1.0, 3.0])},
            "weighting": draws.choice(["none", "bsmntw"]),
            **past,
        }
    if method == "kd":
        past = {"past": draws.choice(["mixed", "noisy", "clean"])} if causal else {}
        return {"student_sampler": STOCHASTIC, **past}
    if method == "teacher_only":
        return {
            "guidance_scale": draws.choice([1.0, 2.0]), "target": draws.choice(["v", "x0"]),
            "input": draws.choice(["data", "student"]), "student_sampler": {"steps": 2},
        }  # fmt: skip
    if method == "consistency":
        kind = draws.choice(
            [{"discrete": {"steps": 8, "skip": 2}}, {"continuous": {"tangent_warmup": 2}}]
        )
        return {"guidance_scale": 2.0, "student_sampler": STOCHASTIC, **kind}
    if method == "ladd":
        return {
            "student_sampler": STOCHASTIC, "rollout": draws.choice(["data", "simulate"]),
            "r1_weight": draws.choice([0.0, 1.0]),
            "discriminator_update": draws.choice(["alternate", "every_step"]),
        }  # fmt: skip
    values: dict[str, Any] = {
        "generator_update_interval": 2, "real_score_guidance_scale": draws.choice([1.0, 2.0]),
        "critic_update": draws.choice(["alternate", "every_step"]), "student_sampler": STOCHASTIC,
    }  # fmt: skip
    if method in ("dmd2", "rcm"):
        values["rollout"] = draws.choice(["simulate", "data"])
    if method == "self_forcing":
        values["same_step_across_chunks"] = draws.choice([True, False])
        values["gradient_frames"] = draws.choice([1, 21, None])
    if method == "rcm":
        values |= draws.choice([{"discrete": {"steps": 8}}, {"continuous": {"tangent_warmup": 2}}])
    if gan:
        values["gan"] = {"r1_weight": draws.choice([0.0, 1.0])}
    return values


def _export(draws: random.Random, *, ema: bool, lora: bool, number: int) -> dict[str, Any]:
    export: dict[str, Any] = {
        "role": "student", "folder": f"export-{number}", "ema": ema,
        "format": draws.choice(["diffusers", "diffusers", "comfyui", "lora"]),
    }  # fmt: skip
    if draws.random() < 0.3:
        export["precision"] = draws.choice(["fp32", "bf16"])
    if draws.random() < 0.5:
        export["verify"] = True
    if export["format"] == "lora" and lora == (draws.random() < 0.05):
        export["lora_rank"] = 2
    return export


# -- what must hold -------------------------------------------------------------------------------


@frozen(kw_only=True)
class Outcome:
    """What became of one drawn file.

    Attributes:
        problems: why the check refused it; empty: it was accepted, and so it was run.
        differences: files in which the run that was stopped ended otherwise.
        files: number of files that were compared.
    """

    values: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    files: int = field(default=0)


def try_file(seed: int, folders: Folders, folder: Path) -> Outcome:
    """Draw a file; run it, and run it once more with a stop on the way; compare."""
    values = draw(seed, folders)
    try:
        config = _read(values, folder / "whole")
    except ConfigError as error:
        return Outcome(values=values, problems=tuple(map(str, error.problems)))
    _train(config)
    stop = random.Random(seed).randint(1, STEPS - 1)
    parts = _read(values, folder / "parts")
    stopped = _train(parts, stop=stop)
    assert stopped < STEPS
    assert _train(parts) == STEPS
    left, right = _contents(folder / "whole"), _contents(folder / "parts")
    # A run that is asked to stop leaves out the validation that was due just then.
    left_out = f"validation/iteration-{stopped:06d}/"
    different = sorted(
        name
        for name in left
        if left[name] != right.get(name) and not (name.startswith(left_out) and name not in right)
    )
    return Outcome(values=values, differences=tuple(different), files=len(left))


def _read(values: Mapping[str, Any], out: Path) -> RunConfig:
    file = out.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    training = {**values["training"], "output_dir": str(out)}
    file.write_text(yaml.safe_dump({**values, "training": training}, sort_keys=False))
    return read_config(file)


def _train(config: RunConfig, *, stop: int | None = None) -> int:
    """Train, and ask for a stop within iteration ``stop``; return the last iteration."""
    run = build(config, distribution=one_process())
    step = run.method.single_train_step

    def step_and_stop(batch: Any, iteration: int) -> Any:
        result = step(batch, iteration)
        if iteration == stop:
            run.method.stop.request("drawn")
        return result

    if stop is not None:
        run.method.single_train_step = step_and_stop  # type: ignore[method-assign]
    return run.trainer.run(run.method, run.loader).iteration


def _contents(out: Path) -> dict[str, Any]:
    """Read what a run left, without what depends on the clock or on its folder.

    Of its checkpoints only the last: a stop leaves one more, and another one is then dropped.
    """
    files: dict[str, Any] = {}
    last = f"checkpoint-{STEPS:06d}"
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or name.startswith("."):
            continue
        if name.startswith("checkpoint-") and not name.startswith(last):
            continue
        if name == "metrics.jsonl":
            files[name] = [_without_clock(json.loads(line)) for line in path.open()]
        elif name in (f"{last}/manifest.json", f"{last}/config.json", "report.html"):
            continue  # names of folders, and times
        elif path.suffix != ".yaml":
            files[name] = path.read_bytes().replace(str(out).encode(), b"<out>")
    return files


def _without_clock(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith("time")}
