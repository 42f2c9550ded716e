"""Every family and every method once, for the test of all families by all methods: a new family is
a row of ``FAMILIES``, a new method a row of ``METHODS``.

A cell is a run of five iterations from a run file: it is checked, trained, resumed, validated,
exported, and its export sampled by the stock pipeline of diffusers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import hunyuan_pipelines
import longcat_pipelines
import ltx2_pipelines
import ltx_pipelines
import qwen_image_pipelines
import sd3_pipelines
import torch
import wan_variants
import yaml
import z_image_pipelines
from app_ranks import read_losses
from attrs import evolve, field, frozen
from distill_adapters_qwen_image import adapter as qwen_image
from distill_adapters_wan import CausalConfig
from distill_conditioning import ShardWriter, preprocess
from distill_diffusers.calls.tokens import pack, unpack
from distill_protocols import (
    Condition,
    LatentParts,
    ModelBundle,
    RowGenerators,
    SamplerSpec,
    draw_noise,
    main_part,
    one_tensor,
)
from distill_runfile.read import read_config
from distill_runfile.structure import to_plain
from distill_train.build import Run, build
from PIL import Image
from random_runs import write_trajectories
from safetensors.torch import load_file
from tiny_run import one_process
from torch import Tensor

PROMPT, NEGATIVE = "a seven moving left", "moving"
STEPS, MIDDLE = 5, 3
GUIDED = {"steps": 4, "shift": 3.0, "guidance": 3.0}
FEW = {"steps": 2, "timesteps": [1000, 700]}
MATCHING = {
    "generator_update_interval": 2, "real_score_guidance_scale": 2.0, "student_sampler": FEW,
}  # fmt: skip
SCORES = ("student", "teacher", "critic")
HEADS = {"heads": {"on": "teacher", "blocks": [0, 1], "width": 8}}

METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "finetune": (("student",), {"student_sampler": GUIDED}),
    "kd": (("student",), {"student_sampler": FEW}),
    "teacher_only": (("student", "teacher"), {"guidance_scale": 2.0, "student_sampler": FEW}),
    "consistency": (
        ("student", "teacher"),
        {"guidance_scale": 2.0, "discrete": {"steps": 8, "skip": 2}, "student_sampler": FEW},
    ),
    "ladd": (
        ("student", "teacher", "discriminator"),
        {"generator_update_interval": 2, "student_sampler": {"steps": 1}},
    ),
    "dmd2": (SCORES, MATCHING),
    "rcm": (SCORES, {**MATCHING, "continuous": {"tangent_warmup": 2}}),
    "causvid": (SCORES, MATCHING),
    "self_forcing": (SCORES, MATCHING),
}
"""By method: its roles, and its ``method_config``."""
TWO_EXPERTS = {"rcm": {"continuous": None, "discrete": {"steps": 8, "skip": 2}}}
"""A derivative at one t knows nothing of the other expert."""


@frozen(kw_only=True)
class FamilyCase:
    """A tiny model of a family, and the stock pipeline that reads its exports.

    Attributes:
        plugin: ``module:PLUGIN``.
        build: writes the pipeline into a folder, and gives where it is.
        pipeline_config: keys of that section, as its class takes them.
        pipeline: class of diffusers that samples an export.
        no_stock: why no stock pipeline samples an export of a student alike; "" where one does.
        picture: whether the model reads a first frame.
        options: by method, keys that are laid over its ``method_config``; None drops one.
        prepare: sets what the pipeline keeps as attributes, from the ``pipeline_config``.
        to_stock: latents [B, C, T, H, W] as the pipeline takes and gives them.
        from_stock: back again.
        fixture: of pytest, which installs the plugin; "" where it is installed.
        takes_latents: whether the pipeline takes the noise; otherwise it draws the adapter's.
        atol: how far the stock pipeline's latents may be from the adapter's at equal noise levels;
            0: bit for bit.
        levels_atol: and at the sampler's own, which its scheduler rounds to fp32.
    """

    plugin: str
    build: Callable[[Path], Path]
    pipeline_config: Mapping[str, Any]
    pipeline: str
    no_stock: str = ""
    picture: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(factory=dict)
    prepare: Callable[[Any, Any], None] = lambda pipeline, config: None
    to_stock: Callable[[Tensor], Tensor] = lambda latents: latents
    from_stock: Callable[[Tensor], Tensor] = lambda latents: latents
    fixture: str = ""
    takes_latents: bool = True
    atol: float = 0.0
    levels_atol: float = 1e-5


def _wan(variant: str, pipeline: str = "WanPipeline", **options: Any) -> FamilyCase:
    def build_variant(folder: Path) -> Path:
        return wan_variants.build(
            variant, wan_variants.template(folder / "template"), folder / "pipeline"
        )

    kind = wan_variants.VARIANTS[variant]
    config = {
        "num_frames": 9, "height": 32, "width": 48,
        "max_sequence_length": kind.config.max_sequence_length, **options.pop("config", {}),
    }  # fmt: skip
    return FamilyCase(
        plugin="distill_adapters_wan:PLUGIN",
        build=build_variant,
        pipeline_config=config,
        pipeline="WanImageToVideoPipeline" if kind.image else pipeline,
        picture=kind.image,
        **options,
    )


def _set_lengths(pipeline: Any, config: Any) -> None:
    pipeline.tokenizer_max_length = config.max_sequence_length
    pipeline.tokenizer_2_max_length = config.glyph_sequence_length


def _hunyuan15(version: str, pipeline: str, width: int, **options: Any) -> FamilyCase:
    return FamilyCase(
        plugin="distill_adapters_hunyuan.video15.plugin:PLUGIN",
        build=partial(hunyuan_pipelines.build15, version=version),
        pipeline_config={
            "num_frames": 9, "height": 32, "width": width,
            "max_sequence_length": 8, "glyph_sequence_length": 8,
        },
        pipeline=pipeline,
        prepare=_set_lengths,
        **options,
    )  # fmt: skip


def _ltx2(prepare: Callable[[Any, Any], None] = lambda pipeline, config: None, **config: Any):
    return FamilyCase(
        plugin="distill_adapters_ltx2:PLUGIN",
        build=ltx2_pipelines.build,
        pipeline_config={
            "num_frames": 17, "height": 64, "width": 96, "max_sequence_length": 8,
            "stg_scale": 1.0, "stg_blocks": (1,), "guidance_rescale": 0.7, **config,
        },
        pipeline="LTX2Pipeline",
        prepare=prepare,
        from_stock=ltx2_pipelines.normalised,
        takes_latents=False,
        # Clean latents and back to v: the pipeline rounds once more, and encodes both prompts
        # together.
        atol=1e-5,
    )  # fmt: skip


FAMILIES: dict[str, FamilyCase] = {
    "Wan 2.1": _wan("t2v"),
    "Wan 2.1 causal": _wan(
        "t2v",
        config={"causal": CausalConfig(roles=("student",), chunk_frames=1)},
        no_stock="Stock pipelines do not sample a causal student.",
    ),
    "Wan 2.1 I2V": _wan("i2v-2.1"),
    "Wan 2.2 A14B": _wan("t2v-experts", options=TWO_EXPERTS),
    "Wan 2.2 I2V A14B": _wan("i2v-experts", options=TWO_EXPERTS),
    "Wan 2.2 TI2V": _wan("ti2v"),
    "LTX-Video": FamilyCase(
        plugin="distill_adapters_ltx:PLUGIN",
        build=partial(ltx_pipelines.build, version="0.9.1"),
        pipeline_config={
            "num_frames": 17, "height": 64, "width": 96, "frame_rate": 24, "max_sequence_length": 8,
        },
        pipeline="LTXPipeline",
        to_stock=pack,
        from_stock=lambda latents: unpack(latents, (3, 2, 3)),
    ),
    "LTX-2": _ltx2(prepare=ltx2_pipelines.isolate),
    "LTX-2 with sound": _ltx2(audio=True, modality_scale=3.0),
    "HunyuanVideo": FamilyCase(
        plugin="distill_adapters_hunyuan.video.plugin:PLUGIN",
        build=hunyuan_pipelines.build,
        pipeline_config={
            "num_frames": 9, "height": 32, "width": 48, "max_sequence_length": 8,
            "embedded_guidance": 2.0,
        },
        pipeline="HunyuanVideoPipeline",
    ),
    "HunyuanVideo 1.5": _hunyuan15("t2v", "HunyuanVideo15Pipeline", 48),
    "HunyuanVideo 1.5 I2V": _hunyuan15(
        "i2v", "HunyuanVideo15ImageToVideoPipeline", 32, picture=True
    ),
    "LongCat-Video": FamilyCase(
        plugin="distill_adapters_longcat:PLUGIN",
        build=longcat_pipelines.build,
        pipeline_config={"num_frames": 9, "height": 32, "width": 48, "max_sequence_length": 8},
        pipeline="none",
        no_stock="Diffusers has no pipeline of LongCat-Video.",
    ),
    "Qwen-Image": FamilyCase(
        plugin="distill_adapters_qwen_image:PLUGIN",
        build=qwen_image_pipelines.build,
        pipeline_config={"height": 32, "width": 48, "max_sequence_length": 12},
        pipeline="QwenImagePipeline",
        to_stock=qwen_image.pack,
        from_stock=lambda latents: qwen_image.unpack(latents, (4, 6)),
    ),
    "Z-Image": FamilyCase(
        plugin="distill_adapters_z_image:PLUGIN",
        build=z_image_pipelines.build,
        pipeline_config={"height": 32, "width": 48, "max_sequence_length": 12},
        pipeline="ZImagePipeline",
        to_stock=lambda latents: latents.squeeze(2),
        from_stock=lambda latents: latents.unsqueeze(2),
    ),
    "Stable Diffusion 3": FamilyCase(
        plugin="distill_family_sd3.plugin:PLUGIN",
        build=sd3_pipelines.build,
        pipeline_config={"height": 32, "width": 48, "max_sequence_length": 8},
        pipeline="StableDiffusion3Pipeline",
        to_stock=lambda latents: latents.squeeze(2),
        from_stock=lambda latents: latents.unsqueeze(2),
        fixture="sd3",
    ),
}  # fmt: skip
"""By the name that people know it by. The table in docs/reference/families.md has one column
each."""

QUICK = {
    ("Wan 2.2 A14B", "consistency"),
    ("Wan 2.1 causal", "self_forcing"),
    ("Wan 2.1 I2V", "teacher_only"),
    ("LTX-Video", "kd"),
    ("HunyuanVideo", "dmd2"),
    ("HunyuanVideo 1.5 I2V", "finetune"),
    ("LTX-Video", "causvid"),
    ("LTX-2", "finetune"),
    ("LTX-2 with sound", "dmd2"),
    ("LongCat-Video", "dmd2"),
    ("Qwen-Image", "rcm"),
    ("Z-Image", "ladd"),
    ("Stable Diffusion 3", "finetune"),
}
"""The cells of the normal suite: each family and each kind of method about once. All others are
slow."""


class PreparedFamily:
    """A case with its pipeline, its data and its trajectories, each made at first use."""

    def __init__(self, case: FamilyCase, root: Path) -> None:
        self.case, self._root = case, root
        module, _, name = case.plugin.partition(":")
        self.plugin: Any = vars(import_module(module))[name]
        self.config: Any = self.plugin.config_class(**_plain(case.pipeline_config))
        self.path = case.build(root / "model")

    @property
    def clip_size(self) -> tuple[int, int, int]:
        """(F, H, W) in pixels."""
        return (self.config.num_frames, self.config.height, self.config.width)

    def features(self) -> dict[str, str]:
        """Say what the family states beside its methods, by the title of a column."""
        config = self.plugin.config_class(**self.case.pipeline_config)
        states = self.plugin.capabilities(config)
        options = self.plugin.role_options(config)
        kinds = {
            "first frames": states.supports_image_condition,
            "causal students": states.supports_kv_cache,
            "discriminators": states.supports_features,
            "tangents": states.supports_jvp,
            "LoRA": "lora" in options,
            "FSDP2": "fsdp" in options,
        }
        return {
            **{name: "yes" if value else "no" for name, value in kinds.items()},
            "solvers": ", ".join(sorted(states.solvers)),
            "exports": ", ".join(self.plugin.export_formats()),
            "stock pipeline": self.case.pipeline,
        }

    @property
    def data(self) -> Path:
        """A data set of four clips, encoded by an adapter without roles; every other text is
        shorter than its neighbours."""
        folder = self._root / "data"
        if not folder.exists():
            adapter = self.plugin.adapter(ModelBundle({}), self.config, source=str(self.path))
            if adapter.parts is not None:
                adapter.encode = partial(_encode_with_noise, adapter, adapter.encode)
            draws = torch.Generator().manual_seed(0)
            clips = (
                (f"{i}", (PROMPT, "a")[i % 2], torch.rand(3, *self.clip_size, generator=draws))
                for i in range(4)
            )
            with ShardWriter(folder) as writer:
                alone = adapter.capabilities.embeds_guidance  # no negative prompt anywhere then
                preprocess(
                    clips, adapter, writer,
                    negative_prompt=None if alone else NEGATIVE, first_frames=self.case.picture,
                )  # fmt: skip
        return folder

    @property
    def trajectories(self) -> Path:
        """States at the levels of ``FEW``."""
        folder = self._root / "trajectories"
        return folder if folder.exists() else write_trajectories(self.data, folder, samples=4)

    @property
    def picture(self) -> Path:
        """A first frame, 8 bits."""
        file = self._root / "first.png"
        if not file.exists():
            _, height, width = self.clip_size
            draws = torch.Generator().manual_seed(2)
            pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=draws)
            Image.fromarray(pixels.numpy()).save(file)
        return file

    def write(self, folder: Path, method: str, *, steps: int = STEPS, **sampler: Any) -> Path:
        """Write a run file; ``sampler`` is laid over the student's."""
        roles, options = METHODS[method]
        options = {**options, **self.case.options.get(method, {})}
        options = {key: value for key, value in options.items() if value is not None}
        options["student_sampler"] = options["student_sampler"] | sampler
        pictures = {"images": [str(self.picture)]} if self.case.picture else {}
        models = {n: {"path": str(self.path)} if n != "discriminator" else HEADS for n in roles}
        values = {
            "recipe": {"family": self.plugin.name, "method": method},
            "models": models,
            "training": {
                "output_dir": str(folder / "out"), "max_train_steps": steps, "progress": False,
                "global_batch_size": 2, "log_every": 1, "trackers": ["jsonl"],
                "optimizer": {"lr": 1e-3},
            },
            "data": {"path": str(self.trajectories if method == "kd" else self.data)},
            "pipeline_config": to_plain(self.case.pipeline_config),
            "method_config": options,
            "checkpoint": {
                "every_steps": MIDDLE, "resume": "latest",
                "export": [{"role": "student", "folder": "student", "verify": True}],
            },
            "validation": {
                "every_steps": steps, "prompts": [PROMPT], **pictures,
                "views": {"student": {"role": "student"}},
            },
            "callbacks": {"grad_clip": {}, "ema": {"roles": ["student"], "decay": 0.5}},
        }  # fmt: skip
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    def condition(self, run: Run, prompt: str) -> Condition:
        """Encode a prompt, and the picture where the model reads one."""
        cond = run.adapter.encode_condition([prompt])
        if not self.case.picture:
            return cond
        assert run.adapter.images is not None
        with Image.open(self.picture) as image:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            frame = pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 255
        return run.adapter.images.with_image(cond, frame)

    def sample_exported(self, run: Run, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
        """Sample with the stock pipeline of an export, and with the trainer's adapter at the noise
        levels of the pipeline's scheduler and at those of the sampler."""
        record = json.loads((folder / "sampler_spec.json").read_text())
        pipeline: Any = getattr(diffusers, self.case.pipeline).from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        copy_out_of_mapped_files(pipeline)
        self.case.prepare(pipeline, self.config)
        noise = draw_noise(run.adapter, run.adapter.latent_shape, RowGenerators.of_clips(1, [0]))
        call = {**record["call"], "prompt": PROMPT, "negative_prompt": NEGATIVE}
        if self.case.picture:
            with Image.open(self.picture) as image:
                call["image"] = image.copy()
        if self.case.takes_latents:
            call["latents"] = self.case.to_stock(one_tensor(noise)).contiguous()
        else:
            call["generator"] = torch.Generator().manual_seed(1)
        theirs, *_ = pipeline(output_type="latent", return_dict=False, **call)
        cond, negative = (self.condition(run, prompt) for prompt in (PROMPT, NEGATIVE))
        timesteps = record["sampler"]["timesteps"]
        spec = SamplerSpec(
            **{**record["sampler"], "timesteps": timesteps and tuple(map(float, timesteps))}
        )
        levels = tuple((1000 * pipeline.scheduler.sigmas[:-1].double()).tolist())
        exact = evolve(spec, shift=1.0, timesteps=levels)
        at_levels, at_spec = (
            run.adapter.sample("student", s, noise, cond, neg_cond=negative) for s in (exact, spec)
        )
        return self.case.from_stock(theirs), main_part(at_levels), main_part(at_spec)


def _encode_with_noise(adapter: Any, encode: Callable[[Tensor], Tensor], video: Tensor):
    """Encode clips, and give them further parts of noise: what sound would be."""
    draws, main = torch.Generator().manual_seed(3), encode(video)
    shapes = adapter.part_shapes(tuple(main.shape[1:]))
    noise = {n: torch.randn(len(main), *shape, generator=draws) for n, shape in shapes.items()}
    return LatentParts({**noise, next(iter(shapes)): main})


def _plain(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what only a run has roles for: data are encoded alike without."""
    return {key: value for key, value in keys.items() if key != "causal"}


def copy_out_of_mapped_files(pipeline: Any) -> None:
    """Copy weights of transformers and VAE, and let them need no gradient, as ours are: a product
    may round otherwise by where numbers lie in a mapped file, and by whether it is recorded."""
    for name, module in pipeline.components.items():
        if name.startswith(("transformer", "vae")) and module is not None:
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
            module.requires_grad_(False)


def train(file: Path) -> Run:
    """Run a file to its end in this process."""
    run = build(read_config(file), distribution=one_process())
    run.trainer.run(run.method, run.loader)
    run.method.set_trainable("student", False)
    return run


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint."""
    return {
        f"{file.relative_to(checkpoint)}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def check_cell(family: PreparedFamily, method: str, folder: Path) -> str:
    """Train, resume, validate and export one cell; return how the stock pipeline compares.

    The checkpoint of the last iteration is deleted, and the file run again from the one before.

    Raises:
        ConfigError: the family cannot do what the method asks for.
    """
    file, out = family.write(folder, method), folder / "out"
    train(file)
    middle, last = out / f"checkpoint-{MIDDLE:06}", out / f"checkpoint-{STEPS:06}"
    expected, numbers = stored(last), read_losses(out)
    assert list(numbers) == list(range(1, STEPS + 1))
    assert any("ema" in name for name in expected)
    assert any("optim" in name for name in expected)
    written = (middle / "manifest.json").stat().st_mtime_ns
    for name in (last, out / "student", out / "validation"):
        shutil.rmtree(name)
    run = train(file)
    assert (middle / "manifest.json").stat().st_mtime_ns == written  # it went on from there
    resumed, before = stored(last), stored(middle)
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []
    assert read_losses(out) == numbers
    assert any(not torch.equal(before[name], value) for name, value in expected.items())
    shown = list((out / "validation" / f"iteration-{STEPS:06}" / "student").iterdir())
    assert shown
    assert all(file.stat().st_size > 0 for file in shown)

    if family.case.no_stock:
        assert (out / "student" / "sampler_spec.json").is_file()
        return f"exported: {family.case.no_stock}"
    theirs, at_levels, at_spec = family.sample_exported(run, out / "student")
    difference = float((theirs - at_levels).abs().max())
    assert difference <= family.case.atol, difference
    torch.testing.assert_close(theirs, at_spec, rtol=0, atol=family.case.levels_atol)
    assert theirs.std() > 0.1
    return "bit for bit" if difference == 0 else f"within {family.case.atol:g}"
