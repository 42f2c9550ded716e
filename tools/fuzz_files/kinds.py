"""Every kind of file that is read: where a whole one comes from, and what reads it.

``Kind.use`` does what a run, an export, a migration or a data set does with the file, and may raise
errors of the framework's tree alone. Where more than that is known (what the file states, or which
checkpoint must be taken), it compares, and raises ``SilentDifferenceError``.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from attrs import field, frozen

from fuzz_files.mutations import (
    Mutator,
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_yaml,
)

Use = Callable[[Path], object]
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny"


class SilentDifferenceError(Exception):
    """A damaged file was read, as something else than its content."""


@frozen(kw_only=True)
class Kind:
    """One kind of file.

    Attributes:
        name: for the report.
        template: makes the folder with a whole file, once.
        file: to be mutated, relative to it, as a pattern of which it is the only match.
        mutate: how.
        use: reads it, from a copy of the folder.
        sign: called after the mutation, for files whose checksums stand elsewhere.
    """

    name: str
    template: Callable[[], Path]
    file: str
    mutate: Mutator
    use: Use
    sign: Callable[[Path], None] = field(default=lambda folder: None)


def require(ok: bool, what: str) -> None:
    """Raise ``SilentDifferenceError`` unless ``ok``."""
    if not ok:
        raise SilentDifferenceError(what)


def _new_folder() -> Path:
    """Make a folder that is deleted when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def make_folder(make: Callable[[Path], object]) -> Callable[[], Path]:
    """Return a folder that ``make`` fills, once a process, and that goes with it."""

    @functools.cache
    def template() -> Path:
        folder = _new_folder() / "whole"
        folder.mkdir()
        make(folder)
        return folder

    return template


# -- run files ------------------------------------------------------------------------------------


def _write_run_files(folder: Path) -> None:
    from run_files import tiny_run

    values = tiny_run(Path("/tmp/never-made"))
    values["validation"] = {
        "every_steps": 2, "prompts": ["the digit three moving up"],
        "views": {"a": {"role": "student", "sampler": {"steps": 2, "shift": 3.0}}},
    }  # fmt: skip
    pipeline = values.pop("pipeline_config")
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    (folder / "pipeline.json").write_text(json.dumps(pipeline))
    values["pipeline_config"] = pipeline
    (folder / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for kind in ("yaml", "json"):
        values["pipeline_config"] = {"pipeline_config_path": f"./pipeline.{kind}"}
        (folder / f"with-{kind}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    roles = {"critic": {"precision": "bf16", "lora": {"rank": 2, "alpha": 4.0}}}
    (folder / "models.json").write_text(json.dumps(roles, indent="\t"))
    values["pipeline_config"] = pipeline
    (folder / "config.json").write_text(json.dumps(values))


def _use_run_file(folder: Path, name: str = "run.yaml", models: str | None = None) -> None:
    from distill_runfile import read_config

    config = read_config(folder / name, None if models is None else folder / models)
    again = folder / "again.yaml"
    again.write_text(json.dumps(config.resolved))
    require(read_config(again).resolved == config.resolved, "its record reads otherwise")
    again.unlink()


def _use_yaml(folder: Path) -> None:
    from distill_runfile import read_source

    source = read_source(folder / "run.yaml")
    if source.values is not None and not source.problems:
        text = (folder / "run.yaml").read_bytes().decode("utf-8-sig")
        require(
            repr(source.values) == repr(_plain(yaml.load(text, _Yaml12))), "YAML read otherwise"
        )
    _use_run_file(folder)


class _Yaml12(yaml.SafeLoader):
    """An independent reading: PyYAML's own constructors with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] in ("null", "merge")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?[0-9]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    _Yaml12.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
_Yaml12.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _plain(value: Any) -> Any:
    """Convert keys to text, as those of a run file are, and join UTF-16 pairs."""
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    return value


def _use_models_of_a_checkpoint(folder: Path) -> None:
    from distill_runfile import read_models

    read_models(folder / "config.json", "student")


# -- checkpoints ----------------------------------------------------------------------------------


def _write_checkpoints(folder: Path) -> None:
    from distill_checkpoint import CheckpointConfig, CheckpointManager
    from tiny_run import Shape, new_run

    config = CheckpointConfig(every_steps=1, keep_last=3)
    new_run(Shape()).train(folder, 2, CheckpointManager(config, folder, {"width": 6}))


@functools.cache
def _states() -> dict[int, str]:
    """Digest of everything that moves, by iteration, as undamaged checkpoints give it."""
    states = {}
    for iteration in (1, 2):
        folder = _new_folder() / "out"
        shutil.copytree(_CHECKPOINTS() / f"checkpoint-{iteration:06d}",
                        folder / f"checkpoint-{iteration:06d}")  # fmt: skip
        states[iteration] = _resumed(folder)[1]
    return states


def _resumed(folder: Path) -> tuple[int, str]:
    from distill_checkpoint import CheckpointConfig, CheckpointManager
    from tiny_run import Shape, new_run

    run = new_run(Shape(), seed=1)
    run.callbacks["ema"].on_train_start(run.state(folder, 0))
    manager = CheckpointManager(CheckpointConfig(resume="latest"), folder, {"width": 6})
    iteration = manager.resume(run.state(folder, 0), run.callbacks)
    return iteration, hashlib.sha256(repr(_as_text(run.everything())).encode()).hexdigest()


def _as_text(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return [(str(key), _as_text(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return value


def _use_checkpoint(folder: Path, *, signed: bool = False) -> None:
    from distill_checkpoint import StoredCheckpoint, is_checkpoint_folder, role_problems

    states = _states()
    iteration, state = _resumed(folder)
    if not signed:  # a signed change is meant
        require(states.get(iteration) == state, f"resumed {iteration} with another state")
    newest = folder / "checkpoint-000002"
    is_checkpoint_folder(newest)
    list(role_problems(newest, "student", ema=True))
    stored = StoredCheckpoint.open(newest)
    for ema in (False, True):
        for source in stored.weights("student", ema=ema).values():
            source.read(source.describe())


def _sign(folder: Path) -> None:
    """Correct sizes and checksums after a mutation, as an attacker who knows the format would."""
    checkpoint = folder / "checkpoint-000002"
    file = checkpoint / "manifest.json"
    body = json.loads(file.read_text())
    del body["digest"]
    for name, facts in body["files"].items():
        if not (checkpoint / name).is_file():
            continue  # replaced by a pipe, or taken away
        content = (checkpoint / name).read_bytes()
        facts |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**body, "digest": digest}))


def _sign_manifest(folder: Path) -> None:
    """Give a mutated manifest its digest, where it still is an object."""
    file = folder / "checkpoint-000002" / "manifest.json"
    try:
        body = json.loads(file.read_bytes()) if file.is_file() else None
        body.pop("digest", None)
        text = json.dumps(body, sort_keys=True)
    except (ValueError, AttributeError, RecursionError):
        return
    file.write_text(json.dumps({**body, "digest": hashlib.sha256(text.encode()).hexdigest()}))


_CHECKPOINTS = make_folder(_write_checkpoints)


def _checkpoint_kinds() -> Iterator[Kind]:
    newest = "checkpoint-000002"
    files = {
        "manifest.json": mutate_json, "loop.json": mutate_json, "config.json": mutate_json,
        "method.json": mutate_json, "rng.json": mutate_json, "loader.json": mutate_json,
        "optimizers/student.transformer_2.json": mutate_json,
        "schedulers/critic.transformer.json": mutate_json,
        "ema/student.transformer.json": mutate_json, "callbacks/tally.json": mutate_json,
    }  # fmt: skip
    folders = ("roles/student/transformer", "optimizers/critic.transformer", "rng")
    shards = {f"{name}/*.safetensors": mutate_safetensors for name in folders}
    for name, mutate in (files | shards).items():
        common: Any = {"template": _CHECKPOINTS, "file": f"{newest}/{name}", "mutate": mutate}
        yield Kind(name=f"checkpoint: {name}", use=_use_checkpoint, **common)
        yield Kind(
            name=f"checkpoint, signed: {name}",
            use=functools.partial(_use_checkpoint, signed=True),
            sign=_sign_manifest if name == "manifest.json" else _sign,
            **common,
        )


def _use_marker(folder: Path) -> None:
    from distill_checkpoint import claim_output_dir

    with claim_output_dir(folder / "out", resume=True):
        pass


def _write_marker(folder: Path) -> None:
    from distill_checkpoint import claim_output_dir

    with claim_output_dir(folder / "out", resume=False):
        pass


# -- data sets ------------------------------------------------------------------------------------


def _write_data(folder: Path) -> None:
    from distill_conditioning import ShardWriter
    from distill_protocols import Condition

    text = torch.arange(24.0).reshape(2, 3, 4)
    with ShardWriter(folder / "data", fingerprint={"text_encoder.weights": "e"}) as writer:
        writer.set_negative("", Condition({"text": text[:1]}))
        writer.add(["a", "b"], ["x", "y"], torch.ones(2, 2, 1, 2, 2), Condition({"text": text}))


def _use_data(folder: Path) -> None:
    from distill_conditioning import DataConfig, LatentDataset
    from distill_conditioning.dataset_info import dataset_info

    info = dataset_info(folder / "data")
    dataset = LatentDataset(DataConfig(path=str(folder / "data")))
    require(not info.problems, "read in spite of its problems")
    for number in range(min(3, len(dataset))):
        dataset.read(torch.tensor([number]))
        dataset.caption(number)
        dataset.id(number)
    dataset.negative()


def _sign_data(folder: Path) -> None:
    """Correct the sizes in the index after a mutation."""
    file = folder / "data" / "index.json"
    index = json.loads(file.read_text())
    for shard in index["shards"]:
        if (folder / "data" / shard["file"]).is_file():
            shard["bytes"] = (folder / "data" / shard["file"]).stat().st_size
    file.write_text(json.dumps(index))


def _write_trajectories(folder: Path) -> None:
    _trajectory_folder(folder)


def _trajectory_folder(folder: Path) -> Any:
    from distill_conditioning.trajectories import TrajectoryFolder

    return TrajectoryFolder(
        folder / "data", settings={"seed": 0, "sampler": {"steps": 4}}, times=(1000.0, 0.0),
        samples=2, samples_per_shard=2, ids=str, dtype="float32",
    )  # fmt: skip


def _use_trajectories(folder: Path) -> None:
    made = _trajectory_folder(folder)
    made.missing()
    made.complete()


def _write_cache(folder: Path) -> None:
    _cached(folder)


def _cached(folder: Path) -> torch.Tensor:
    from distill_conditioning.provider import ConditionCache
    from distill_protocols import Condition

    cache = ConditionCache(folder / "cache")
    [row] = cache.rows(
        ["x"],
        "prompt",
        {"text_encoder.weights": "e"},
        lambda _: Condition({"text": torch.ones(1, 2, 3)}),
    )
    file = next((folder / "cache").glob("*.safetensors"))
    if file.name != "x.safetensors":
        (folder / "cache" / "name").write_text(file.name)
    return row.tensors["text"]


def _use_cache(folder: Path) -> None:
    require(torch.equal(_cached(folder), torch.ones(1, 2, 3)), "another condition")


# -- models ---------------------------------------------------------------------------------------


def _write_pipeline(folder: Path) -> None:
    import wan_variants

    wan_variants.template(folder / "wan")


def _write_sharded(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    _write_pipeline(folder)
    transformer = folder / "wan" / "transformer"
    whole = transformer / "diffusion_pytorch_model.safetensors"
    weights = load_file(whole)
    names = sorted(weights)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in sorted(set(places.values())):
        save_file({n: weights[n] for n in names if places[n] == part}, transformer / part)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    whole.unlink()
    (transformer / f"{whole.name}.index.json").write_text(json.dumps(index))


def _use_pipeline(folder: Path, *, plan: bool = True, encode: bool = False) -> None:
    """Check and plan a run on it, then load and call it."""
    _check_run_file(folder)
    from distill_adapters_wan import PLUGIN, WanPipelineConfig
    from distill_protocols import Condition, RoleSpec

    config = WanPipelineConfig(num_frames=5, height=32, width=48, max_sequence_length=6)
    path = str(folder / "wan")
    role = RoleSpec(name="student", path=path, trainable=True)
    problems = [
        *PLUGIN.role_problems(role, config),
        *PLUGIN.config_problems(config, ["student"]),
    ]
    PLUGIN.condition_shapes(config, source=path)
    PLUGIN.latent_tokens(config, source=path)
    PLUGIN.frame_conditions(role, config)
    PLUGIN.expert_ranges(role, config)
    if not problems and plan:
        PLUGIN.plan(role, config)
        PLUGIN.plan_call(role, config, source=path, batch=1)
    bundle = PLUGIN.load([role], config, device=torch.device("cpu"))
    adapter = PLUGIN.adapter(bundle, config, source=path)
    latents = torch.zeros(1, *adapter.latent_shape)
    transformer: Any = bundle["student"].modules["transformer"]
    text = Condition({"text": torch.zeros(1, 6, transformer.config.text_dim)})
    adapter.forward("student", latents, torch.tensor([500.0]), text)
    adapter.decode(latents)
    adapter.condition_fingerprint()
    if encode:
        adapter.encode_condition(["a seven"])
    require(not problems, f"used in spite of {problems[:1]}")


def _check_run_file(folder: Path) -> None:
    """Check a run file, which must give problems of the file and raise nothing else."""
    from distill_protocols import ConfigError, DistillError
    from distill_runfile import read_config

    values = {
        "recipe": {"family": "wan", "method": "finetune"},
        "models": {"student": {"path": "./wan"}},
        "training": {"output_dir": "./out", "max_train_steps": 1, "global_batch_size": 1},
        "data": {"path": "./nowhere"},
        "pipeline_config": {
            "num_frames": 5, "height": 32, "width": 48, "max_sequence_length": 6,
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(values))
    try:
        read_config(folder / "run.json", planning=True)
    except ConfigError:
        pass
    except DistillError as error:
        raise SilentDifferenceError(f"no problem of the run file, but {error!r:.200}") from error


def _use_text(folder: Path) -> None:
    """Encode a prompt."""
    from distill_adapters_wan import WanPipelineConfig
    from distill_adapters_wan.text import encode_text, wan_encoders

    config = WanPipelineConfig(num_frames=5, height=32, width=48, max_sequence_length=6)
    encoders = wan_encoders(str(folder / "wan"), config, device=torch.device("cpu"))
    encoders.fingerprint()
    encode_text(encoders, ["a seven"], 6)
    encoders.outputs("text_encoder", ["a seven"], length=6)


def _write_image_pipeline(folder: Path) -> None:
    import wan_variants

    _write_pipeline(folder)
    wan_variants.build("i2v-2.1", folder / "wan", folder / "i2v")


def _use_image_encoder(folder: Path) -> None:
    from distill_adapters_wan import PLUGIN, WanPipelineConfig
    from distill_diffusers.components.images import ImageEncoder

    config = WanPipelineConfig(num_frames=9, height=32, width=48, max_sequence_length=512)
    list(PLUGIN.config_problems(config, ["student"]))
    PLUGIN.condition_shapes(config, source=str(folder / "i2v"))
    encoder = ImageEncoder(str(folder / "i2v"), device=torch.device("cpu"))
    encoder.encode(torch.zeros(1, 3, 32, 48))


def _use_export(folder: Path) -> None:
    """Export a role whose base and components are here, and read it back."""
    from distill_adapters_wan import PLUGIN, WanPipelineConfig
    from distill_protocols import ExportRequest, RoleSpec, SamplerSpec

    config = WanPipelineConfig(num_frames=5, height=32, width=48, max_sequence_length=6)
    path = str(folder / "wan")
    role = RoleSpec(name="student", path=path, trainable=True)
    target = Path(tempfile.mkdtemp(prefix="fuzz-")) / "export"
    request = ExportRequest(sampler=SamplerSpec(steps=2), weights="live", format="diffusers")
    try:
        exporter = PLUGIN.exporter(config, source=path)
        exporter.export(role, PLUGIN.weights(path), target, request)
    finally:
        shutil.rmtree(target.parent, ignore_errors=True)


# -- judges, migrations ---------------------------------------------------------------------------


def _write_judge(folder: Path) -> None:
    shutil.copytree(TINY / "judge", folder / "judge")


class _RunWithoutProblems:
    """What a report's section is checked against, besides its files."""

    def role_problems(self, *_: object, **__: object) -> tuple[()]:
        return ()

    sampler_problems = role_problems


def _use_judge(folder: Path) -> None:
    from distill_evaluation import Judge
    from distill_evaluation.config import ReportEntry
    from distill_evaluation.labels import label_prompts, read_prompts
    from distill_evaluation.plugins import report
    from distill_evaluation.shipped_metrics.frechet import read_reference

    section = report.config_class(
        judge=str(folder / "judge"), prompts=str(folder / "judge" / "prompts.txt"),
        sheet_prompts=("the digit three moving up",), entries={"a": ReportEntry(role="student")},
    )  # fmt: skip
    problems = list(report.problems(section, cast(Any, _RunWithoutProblems())))
    report.metrics(section)
    judge = Judge.load(folder / "judge")
    label_prompts(read_prompts(folder / "judge" / "prompts.txt"), judge.attributes)
    read_reference(folder / "judge")
    judge.classify(
        torch.zeros(
            1, 3, *(getattr(judge.network.config, n) for n in ("frames", "height", "width"))
        )
    )
    require(not problems, f"used in spite of {problems[:1]}")


def _write_foreign(folder: Path) -> None:
    from distill_adapters_wan.names.fastvideo import from_diffusers
    from foreign_files import renamed, save_dcp, save_pt, save_transformer, wan_weights

    weights = renamed(wan_weights(1), from_diffusers)
    newer = folder / "checkpoint-400"
    (newer / "dcp").mkdir(parents=True)
    save_dcp({f"roles.student.transformer.{n}": v for n, v in weights.items()}, newer / "dcp")
    (newer / "metadata.json").write_text(json.dumps({"step": 400, "config": {"models": {}}}))
    save_transformer(wan_weights(1), folder / "transformer")
    save_pt({"generator": {f"model.{n}": v for n, v in weights.items()}}, folder / "init.pt")


def _use_foreign(folder: Path, source: str) -> None:
    from distill_adapters_wan import PLUGIN
    from distill_checkpoint import migrate

    shutil.rmtree(folder / "ours", ignore_errors=True)
    migrate(folder / source, folder / "ours", names=PLUGIN.foreign_names())
    shutil.rmtree(folder / "ours")


# -- all ------------------------------------------------------------------------------------------


def core_kinds() -> list[Kind]:
    """Return the kinds of this module."""
    runs, data, judge = (
        make_folder(_write_run_files),
        make_folder(_write_data),
        make_folder(_write_judge),
    )
    wan, sharded, foreign = (
        make_folder(_write_pipeline),
        make_folder(_write_sharded),
        make_folder(_write_foreign),
    )
    trajectories, image = make_folder(_write_trajectories), make_folder(_write_image_pipeline)
    cache, marker = make_folder(_write_cache), make_folder(_write_marker)
    json_, tensors = mutate_json, mutate_safetensors
    vision, steps = "i2v/image_encoder/config.json", "data/trajectories.json"
    pixels = "i2v/image_processor/preprocessor_config.json"
    stem = "diffusion_pytorch_model.safetensors"
    with_yaml = functools.partial(_use_run_file, name="with-yaml.yaml")
    with_json = functools.partial(_use_run_file, name="with-json.yaml")
    with_models = functools.partial(_use_run_file, models="models.json")
    encode = functools.partial(_use_pipeline, plan=False, encode=True)
    rows: list[tuple[str, Callable[[], Path], str, Mutator, Use]] = [
        ("run file", runs, "run.yaml", mutate_yaml, _use_yaml),
        ("--models_json", runs, "models.json", json_, with_models),
        ("pipeline_config_path, YAML", runs, "pipeline.yaml", mutate_yaml, with_yaml),
        ("pipeline_config_path, JSON", runs, "pipeline.json", json_, with_json),
        ("run file of a checkpoint", runs, "config.json", json_, _use_models_of_a_checkpoint),
        ("output folder: run.json", marker, "out/run.json", json_, _use_marker),
        ("data set: index.json", data, "data/index.json", json_, _use_data),
        ("data set: constants", data, "data/constants.safetensors", tensors, _use_data),
        ("trajectories: settings", trajectories, steps, json_, _use_trajectories),
        ("cached condition", cache, "cache/*.safetensors", tensors, _use_cache),
        ("model_index.json", wan, "wan/model_index.json", json_, _use_pipeline),
        ("model_index.json, exported", wan, "wan/model_index.json", json_, _use_export),
        ("transformer: config.json", wan, "wan/transformer/config.json", json_, _use_pipeline),
        ("VAE: config.json", wan, "wan/vae/config.json", json_, _use_pipeline),
        ("transformer: weights", wan, f"wan/transformer/{stem}", tensors, _use_pipeline),
        ("VAE: weights", wan, f"wan/vae/{stem}", tensors, _use_pipeline),
        ("weight map", sharded, f"wan/transformer/{stem}.index.json", json_, _use_pipeline),
        ("text encoder: config.json", wan, "wan/text_encoder/config.json", json_, _use_text),
        ("text encoder: weights", wan, "wan/text_encoder/model.safetensors", tensors, _use_text),
        ("tokenizer.json", wan, "wan/tokenizer/tokenizer.json", json_, _use_text),
        ("tokenizer_config.json", wan, "wan/tokenizer/tokenizer_config.json", json_, _use_text),
        ("tokenizer.json, whole run", wan, "wan/tokenizer/tokenizer.json", json_, encode),
        ("image encoder: config.json", image, vision, json_, _use_image_encoder),
        ("image processor", image, pixels, json_, _use_image_encoder),
        ("judge.json", judge, "judge/judge.json", json_, _use_judge),
        ("judge: weights", judge, "judge/judge.safetensors", tensors, _use_judge),
        ("judge: reference", judge, "judge/reference.safetensors", tensors, _use_judge),
        ("prompts.txt", judge, "judge/prompts.txt", mutate_bytes, _use_judge),
    ]  # fmt: skip
    migrations = [
        ("metadata.json", "checkpoint-400/metadata.json", json_, "checkpoint-400"),
        (".metadata", "checkpoint-400/dcp/.metadata", mutate_bytes, "checkpoint-400"),
        (".distcp", "checkpoint-400/dcp/__0_0.distcp", mutate_bytes, "checkpoint-400"),
        (".pt", "init.pt", mutate_bytes, "init.pt"),
        ("transformer", f"transformer/{stem}", tensors, "transformer"),
    ]
    rows += [
        (
            f"migration: {name}",
            foreign,
            file,
            mutate,
            functools.partial(_use_foreign, source=source),
        )
        for name, file, mutate, source in migrations
    ]
    shard = Kind(
        name="data set: shard", template=data, file="data/shard-00000.safetensors", mutate=tensors,
        use=_use_data, sign=_sign_data,
    )  # fmt: skip
    plain = [
        Kind(name=name, template=template, file=file, mutate=mutate, use=use)
        for name, template, file, mutate, use in rows
    ]
    return [*plain, shard, *_checkpoint_kinds()]
