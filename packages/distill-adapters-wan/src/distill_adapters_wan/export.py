"""One role as a pipeline folder that stock ``diffusers.WanPipeline`` loads and samples alike."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
from attrs import asdict
from distill_protocols import ModelBundle, OutputError, RoleHandle, SamplerSpec, WeightsError

from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.folders import component_faults, fetch, read_json
from distill_adapters_wan.scheduler import StockSchedule, stock_schedule

SPEC_FILE = "sampler_spec.json"
"""Beside model_index.json; also the mark by which an export may replace an older one."""
_COMPONENTS = ("vae", "text_encoder", "tokenizer")
_TOLERABLE = 0.5
"""Units of t; one step of the 1000 that Wan was trained on is 1."""


class WanExporter:
    """``Exporter`` of the Wan family.

    Args:
        bundle: the run's roles.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id that VAE, text encoder and tokenizer are copied from.
    """

    def __init__(self, bundle: ModelBundle, config: WanPipelineConfig, *, source: str) -> None:
        self._bundle = bundle
        self._config = config
        self._source = source

    def __call__(
        self, role: str, folder: str, *, sampler: SamplerSpec, ema: bool
    ) -> Mapping[str, Any]:
        """Write ``folder`` whole or not at all.

        ``WanPipeline.from_pretrained(folder)(prompt, **facts["call"])`` then samples as ``sampler``
        says; ``facts["notes"]`` tells where stock code cannot. An older export in ``folder`` is
        replaced; anything else there is left alone.

        Returns:
            what ``sampler_spec.json`` holds: sampler, call, timesteps, deviation, notes ...

        Raises:
            OutputError: ``folder`` holds something else, or cannot be written.
            WeightsError: a component to copy is missing or damaged.
            RoleError: no such role, or it keeps no EMA.
        """
        handle = self._bundle[role]
        source = fetch(self._source, _COMPONENTS)
        for fault in component_faults(source):
            raise WeightsError(f"{role} cannot be exported: {fault}")
        schedule = stock_schedule(sampler)
        facts = self._facts(role, sampler, schedule, ema=ema)
        with _whole_or_nothing(Path(folder)) as stage, handle.averaged(ema=ema):
            _write_transformer(handle, stage)
            schedule.scheduler().save_pretrained(stage / "scheduler")
            for name in _COMPONENTS:
                if (source / name).is_dir():
                    _copy(source / name, stage / name)
            _name_tokenizer(stage / "tokenizer" / "tokenizer_config.json")
            _write_json(stage / "model_index.json", _model_index(source, stage))
            _write_json(stage / SPEC_FILE, facts)
        return facts

    def _facts(
        self, role: str, spec: SamplerSpec, schedule: StockSchedule, *, ema: bool
    ) -> dict[str, Any]:
        return {
            "role": role,
            "weights": "ema" if ema else "live",
            "sampler": asdict(spec),
            "timesteps": [1000 * sigma for sigma in spec.sigmas()],
            "stock_timesteps": list(schedule.timesteps),
            "timestep_deviation": schedule.deviation,
            "call": {
                "num_inference_steps": spec.steps,
                "guidance_scale": spec.guidance,
                "num_frames": self._config.num_frames,
                "height": self._config.height,
                "width": self._config.width,
                "max_sequence_length": self._config.max_sequence_length,
            },
            "notes": list(_notes(spec, schedule)),
        }


def _notes(spec: SamplerSpec, schedule: StockSchedule) -> Iterator[str]:
    if schedule.deviation > _TOLERABLE:
        yield (
            f"stock timesteps differ from the sampler's by up to {schedule.deviation:.2f} of 1000: "
            "FlowMatchEulerDiscreteScheduler cannot make them; `timesteps` holds the exact ones"
        )
    if spec.guidance < 1:
        yield (
            f"WanPipeline treats guidance_scale {spec.guidance:g} as 1 (it guides only above 1), "
            "so it cannot repeat this sampler"
        )
    if spec.guidance > 1:
        yield "pass the run's negative prompt; WanPipeline's own default is the empty one"


def _write_transformer(handle: RoleHandle, stage: Path) -> None:
    for name, module in handle.modules.items():
        module.save_pretrained(stage / name, safe_serialization=True)  # type: ignore[operator]


def _model_index(source: Path, stage: Path) -> dict[str, Any]:
    """The source's index with our scheduler, and with only what was written."""
    index = read_json(source / "model_index.json")
    kinds = {name: kind for name, kind in index.items() if isinstance(kind, list)}
    kinds |= {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
    if kinds.get("tokenizer", [None, None])[1] == _NEW_TOKENIZER:
        kinds["tokenizer"] = ["transformers", _OLD_TOKENIZER]
    for name in kinds:
        if not (stage / name).is_dir():
            kinds[name] = [None, None]
    return {**index, **kinds, "_diffusers_version": diffusers.__version__}


_NEW_TOKENIZER, _OLD_TOKENIZER = "TokenizersBackend", "PreTrainedTokenizerFast"


def _name_tokenizer(file: Path) -> None:
    """transformers 5 writes a class that 4 does not have; 5 reads the old name as well."""
    if file.is_file():
        config = read_json(file)
        if config.get("tokenizer_class") == _NEW_TOKENIZER:
            _write_json(file, {**config, "tokenizer_class": _OLD_TOKENIZER})


def _copy(source: Path, target: Path) -> None:
    # Links are followed: a hub cache is all links, and an export must stand alone.
    shutil.copytree(source, target, symlinks=False)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A staging folder beside ``folder``, which takes its place when the block ends well."""
    if folder.exists() and not (folder / SPEC_FILE).is_file() and any(folder.iterdir()):
        raise OutputError(
            f"{folder} already holds something that is no export; it would be lost. Choose another "
            "folder or empty this one"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}); choose a folder where this user may "
            "write"
        ) from error
    try:
        yield stage
        _settle(stage)
        _replace(folder, stage)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"{folder} could not be written: {error}. Free space?") from error
        raise


def _replace(folder: Path, stage: Path) -> None:
    if not folder.exists():
        stage.rename(folder)
        return
    old = stage.with_name(f"{stage.name}.old")
    folder.rename(old)
    try:
        stage.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _settle(stage: Path) -> None:
    """Flush files to disk before the rename, and let others read them (mkdtemp and safetensors
    create for the owner alone)."""
    stage.chmod(0o755)
    for path in stage.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
