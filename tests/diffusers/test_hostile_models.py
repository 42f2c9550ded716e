"""Model folders that are damaged or hostile: one error that names the file, and no hang."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wan_variants
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_diffusers import building
from distill_diffusers.building import limited_building
from distill_diffusers.components.encoders import load_tokenizer
from distill_diffusers.components.images import ImageEncoder
from distill_diffusers.folders import fetch, is_hub_id, locate, weight_files
from distill_diffusers.model_configs import config_problems
from distill_protocols import DistillError, Problem, RoleSpec, WeightsError
from torch import nn

CONFIG = WanPipelineConfig(num_frames=5, height=32, width=48, max_sequence_length=6)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def give_up(*_: object) -> None:
        pytest.fail("no answer")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return wan_variants.template(tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture
def pipeline(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "pipeline"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def checked(pipeline: Path) -> list[Problem]:
    role = RoleSpec(name="student", path=str(pipeline), trainable=True)
    return [*PLUGIN.role_problems(role, CONFIG), *PLUGIN.config_problems(CONFIG, ["student"])]


def encode(pipeline: Path) -> torch.Tensor:
    bundle = PLUGIN.load([], CONFIG, device=torch.device("cpu"))
    adapter = PLUGIN.adapter(bundle, CONFIG, source=str(pipeline))
    return adapter.encode_condition(["a seven"]).tensors["text"]


def load_and_encode(pipeline: Path) -> None:
    load(pipeline)
    encode(pipeline)


def load(pipeline: Path) -> None:
    role = RoleSpec(name="student", path=str(pipeline), trainable=True)
    bundle = PLUGIN.load([role], CONFIG, device=torch.device("cpu"))
    adapter = PLUGIN.adapter(bundle, CONFIG, source=str(pipeline))
    adapter.decode(torch.zeros(1, *adapter.latent_shape))


HOSTILE: dict[str, Any] = {
    "num_layers": 10**9, "patch_size": [], "in_channels": -4, "num_attention_heads": 0,
    "attention_head_dim": 2**62, "ffn_dim": "many", "text_dim": None, "rope_max_seq_len": 10**12,
    "freq_dim": True, "out_channels": [4], "eps": "small", "cross_attn_norm": 3, "qk_norm": {},
}  # fmt: skip


@pytest.mark.parametrize("entry", HOSTILE)
def test_an_absurd_transformer_is_one_problem_and_one_error(pipeline, entry):
    edit(pipeline / "transformer" / "config.json", **{entry: HOSTILE[entry]})
    if entry not in ("eps", "cross_attn_norm", "qk_norm"):  # known when it is built
        (problem,) = checked(pipeline)
        assert entry in problem.message
        assert "config.json" in problem.message
    with pytest.raises(WeightsError, match=entry):
        load(pipeline)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("num_res_blocks", 10**9), ("z_dim", 0), ("base_dim", 2**40), ("dim_mult", "abc"),
     ("temperal_downsample", [3]), ("latents_mean", ["a"]), ("scale_factor_spatial", -8)],
)  # fmt: skip
def test_an_absurd_vae_is_one_error(pipeline, entry, value):
    edit(pipeline / "vae" / "config.json", **{entry: value})
    with pytest.raises(WeightsError, match=entry):
        load(pipeline)


@pytest.mark.parametrize("entry", ["num_layers", "vocab_size", "d_model", "d_kv"])
@pytest.mark.parametrize("value", [10**9, -1, [], None])
def test_an_absurd_encoder_is_one_error(pipeline, entry, value):
    edit(pipeline / "text_encoder" / "config.json", **{entry: value})
    with pytest.raises(WeightsError, match="text_encoder"):
        encode(pipeline)


@pytest.mark.parametrize(
    ("name", "value"),
    [("boundary_ratio", "half"), ("boundary_ratio", -1), ("boundary_ratio", True),
     ("expand_timesteps", 3), ("transformer", "x"), ("transformer", [3, 4]),
     ("transformer", ["x"])],
)  # fmt: skip
def test_an_odd_index_is_one_problem(pipeline, name, value):
    edit(pipeline / "model_index.json", **{name: value})
    reported = checked(pipeline)
    assert len(reported) == 1
    assert "model_index.json" in reported[0].message
    assert name in reported[0].message


NESTED = b"[" * 200_000
BROKEN = {
    "nested": NESTED, "an object nested": b'{"a":' * 200_000, "a list": b"[]", "null": b"null",
    "infinite": b'{"num_layers": Infinity}', "digits": b'{"num_layers": ' + b"9" * 6000 + b"}",
    "twice": b'{"num_layers": 2, "num_layers": 4}', "no UTF-8": b"\xff\xfe{}",
    "half a pair": b'{"a": "\\ud800"}', "empty": b"",
}  # fmt: skip
JSON_FILES = (
    "model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
)  # fmt: skip


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", JSON_FILES)
def test_broken_json_is_one_error_with_its_file(pipeline, name, content):
    (pipeline / name).write_bytes(BROKEN[content])
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")) as excinfo:
        load_and_encode(pipeline)
    assert str(excinfo.value).isprintable()


def spoil_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return spoil


def share_bytes(header: dict[str, Any]) -> None:
    first, second = list(header.values())[-2:]
    second["data_offsets"] = first["data_offsets"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(len(NESTED).to_bytes(8, "little") + NESTED),
        lambda file: file.write_bytes((2).to_bytes(8, "little") + b"[]"),
        spoil_header(share_bytes),
        spoil_header(lambda header: list(header.values())[-1].update(shape=[-1])),
        spoil_header(lambda header: list(header.values())[-1].update(shape="4")),
        spoil_header(lambda header: list(header.values())[-1].pop("dtype")),
    ],
)
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_hostile_header_is_one_problem_and_one_error(pipeline, part, spoil):
    file = pipeline / part / "diffusion_pytorch_model.safetensors"
    spoil(file)
    (problem,) = checked(pipeline)
    assert str(file) in problem.message
    with pytest.raises(WeightsError, match=part):
        load(pipeline)


@pytest.mark.parametrize("shard", ["../vae/x.safetensors", "/etc/passwd", 3, "a\0b", "a" * 300])
def test_a_weight_map_stays_in_its_folder(pipeline, shard):
    folder = pipeline / "transformer"
    name = "diffusion_pytorch_model.safetensors"
    (folder / name).unlink()
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(WeightsError, match=r"index\.json names"):
        weight_files(folder, "diffusion_pytorch_model")
    (problem,) = checked(pipeline)
    assert "index.json names" in problem.message


# -- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}),
        ("tokenizer.json", {"added_tokens": [{"id": 10**20, "content": "x"}]}),
        ("tokenizer.json", {"post_processor": {"type": "TemplateProcessing", "single": []}}),
        ("tokenizer_config.json", {"pad_token": None}),
    ],
)
def test_errors_of_the_tokenizers_library_become_one_error(pipeline, name, changes):
    edit(pipeline / "tokenizer" / name, **changes)
    with pytest.raises(WeightsError, match="tokenizer"):
        load_tokenizer(pipeline / "tokenizer")


def test_warnings_of_libraries_are_printed_without_control_characters(pipeline):
    """They name entries that the library does not know."""
    edit(pipeline / "tokenizer" / "tokenizer_config.json", **{"a\x1b[31m": 1})
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json has an entry whose name"):
        encode(pipeline)
    edit(pipeline / "vae" / "config.json", **{"a\x1b[31m": 1})
    (problem,) = checked(pipeline)
    assert r"a\x1b[31m" in problem.message


def test_token_ids_beyond_the_embedding_are_refused(pipeline):
    file = pipeline / "tokenizer" / "tokenizer.json"
    whole = json.loads(file.read_text())
    model, marks = whole["model"], copy.deepcopy(whole["post_processor"])
    (mark,) = marks["special_tokens"].values()
    mark["ids"] = [98]
    for number, changed in [
        (99, {"model": model | {"vocab": model["vocab"] | {"new": 99}}}),
        (98, {"model": model, "post_processor": marks}),
    ]:
        edit(file, **changed)
        with pytest.raises(
            WeightsError, match=rf"words up to number {number}, and the encoder .* has 8 rows"
        ):
            encode(pipeline)


@pytest.mark.parametrize(
    ("name", "value"),
    [("crop_size", [10**9, 10**9]), ("crop_size", {"height": 25, "width": 24}), ("size", -1),
     ("do_center_crop", False), ("image_std", ["x", 1, 1]), ("image_mean", [0.5]),
     ("resample", "../x")],
)  # fmt: skip
def test_an_image_processor_is_tried_before_it_is_used(pipeline, tmp_path, name, value):
    folder = wan_variants.build("i2v-2.1", pipeline, tmp_path / "i2v")
    encoder = ImageEncoder(str(folder), device=torch.device("cpu"))
    assert encoder.encode(torch.zeros(1, 3, 32, 48)).shape[0] == 1
    edit(folder / "image_processor" / "preprocessor_config.json", **{name: value})
    with pytest.raises(WeightsError, match=r"preprocessor_config\.json describes no image proc"):
        encoder.encode(torch.zeros(1, 3, 32, 48))


# -- a folder of two parts ------------------------------------------------------------------------


def test_a_folder_that_exists_is_no_hub_id(pipeline, monkeypatch):
    """``models/resaved`` reads as ``owner/name``."""
    folder = pipeline.parent / "models" / "resaved"
    folder.parent.mkdir()
    pipeline.rename(folder)
    monkeypatch.chdir(folder.parent.parent)
    assert not is_hub_id("models/resaved")
    assert is_hub_id("models/others")
    assert locate("models/resaved") == Path("models/resaved")
    assert fetch("models/resaved", ()) == Path("models/resaved")
    assert PLUGIN.describe("models/resaved").main["num_layers"] == 2
    bundle = PLUGIN.load([], CONFIG, device=torch.device("cpu"))
    adapter = PLUGIN.adapter(bundle, CONFIG, source="models/resaved")
    assert adapter.encode_condition(["a seven"]).tensors["text"].shape == (1, 6, 16)


# -- the rules by themselves ----------------------------------------------------------------------


def test_building_on_meta_is_limited_and_removes_its_hooks(monkeypatch):
    monkeypatch.setattr(building, "MAX_PARTS", 1000)

    def build() -> nn.Module:
        with torch.device("meta"):
            return nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(10**9))

    too_many = r"x builds nothing .*more than 1,000 modules.*; mend"
    with (
        pytest.raises(WeightsError, match=too_many),
        limited_building("x builds nothing", "mend it"),
    ):
        build()
    hooks = nn.modules.module._global_module_registration_hooks
    assert not hooks
    with pytest.raises(WeightsError, match="ZeroDivisionError"), limited_building("x", "y"):
        1 / 0  # noqa: B018
    with pytest.raises(DistillError, match=r"^as it is$"), limited_building("x", "y"):
        raise WeightsError("as it is")


@pytest.mark.parametrize(
    "plugin",
    [f"distill_adapters_{family}" for family in ("wan", "ltx", "qwen_image", "z_image")],
)
def test_published_models_have_no_problem(plugin):
    import importlib

    published = importlib.import_module(f"{plugin}.published").PUBLISHED
    for model in published.values():
        for config in model.transformers.values():
            plain = json.loads(json.dumps(dict(config)))
            assert list(config_problems(plain)) == []


class _Decoder:
    def __init__(self, scales: tuple[bool, ...] = (True,), gates: bool | None = None) -> None: ...


@pytest.mark.parametrize(
    ("entries", "right"),
    [
        ({"scales": [False, True]}, True),
        ({"scales": None}, True),
        ({"gates": True}, True),
        ({"scales": [False, None]}, False),  # a constructor takes it for false
        ({"scales": [[False]]}, False),  # and this for true
        ({"scales": [1]}, False),
    ],
)
def test_entries_of_a_list_have_the_types_of_the_default(entries, right):
    context = contextlib.nullcontext() if right else pytest.raises(TypeError, match="scales")
    with context:
        building.check_types(_Decoder, entries)
