"""Weights from elsewhere as the start of a role: other codes' files, shards and LoRAs; or the
reason why not, and the command that helps."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
import torch
from distill_adapters_wan import PLUGIN
from distill_adapters_wan.names.original import to_original
from distill_protocols import (
    LoraSpec,
    RoleSpec,
    TensorInfo,
    WeightsError,
    WeightSource,
)
from safetensors.torch import load_file, save_file
from wan_variants import VARIANTS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(pipeline_template):
    """Return the pipeline's own weights and others of the same shapes."""
    own = load_file(pipeline_template / "transformer/diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(5)
    other = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in own.items()}
    return own, other


@pytest.fixture
def role(pipeline_template):
    return RoleSpec(name="student", path=str(pipeline_template), trainable=True)


def start_role(role, config, path) -> dict[str, torch.Tensor]:
    """Check and load a role that starts with ``path``; return its trained weights."""
    assert list(PLUGIN.start_problems(role, config, str(path))) == []
    weights = PLUGIN.start_weights(role, str(path))
    bundle = PLUGIN.load([role], config, device=CPU, weights={role.name: weights})
    return bundle[role.name].modules["transformer"].state_dict()


def problem(role, config, path) -> str:
    (text,) = PLUGIN.start_problems(role, config, str(path))
    with pytest.raises(WeightsError) as excinfo:
        PLUGIN.start_weights(role, str(path))
    assert str(excinfo.value) == text
    return text


def equal(actual, expected) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[k], expected[k]) for k in actual
    )


# -- whole weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_one_file_of_any_code(base, role, config, tmp_path, prefix, names):
    _, other = base
    name_of = to_original if names == "original" else str
    tensors = {prefix + name_of(name): value for name, value in other.items()}
    if prefix == "model.diffusion_model.":  # a file with everything
        tensors |= {
            "first_stage_model.encoder.weight": torch.ones(2),
            "text_encoders.x": torch.ones(2),
        }
    save_file(tensors, tmp_path / "wan.safetensors")
    assert equal(start_role(role, config, tmp_path / "wan.safetensors"), other)


@pytest.mark.parametrize("inside", [".", "transformer"])
def test_shards_of_the_official_repository(base, role, config, tmp_path, inside):
    """As Wan-AI/Wan2.1-T2V-14B: config.json of the original code, shards, and the rest as .pth."""
    _, other = base
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for i, (name, value) in enumerate(other.items()):
        file = f"diffusion_pytorch_model-0000{1 + i % 3}-of-00003.safetensors"
        shards.setdefault(file, {})[to_original(name)] = value
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "t2v", "dim": 1536}))
    (folder / "Wan2.1_VAE.pth").write_bytes(b"x")
    assert equal(start_role(role, config, folder), other)
    index["weight_map"]["head.modulation"] = "../../etc/passwd"
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "no weight_map of files beside it" in problem(role, config, folder)


def test_experts_in_the_folders_of_the_original_code(folder_of, tmp_path):
    """Wan 2.2: high_noise_model/ and low_noise_model/."""
    variant, path = VARIANTS["t2v-experts"], folder_of("t2v-experts")
    role = RoleSpec(name="student", path=path, trainable=True)
    weights = PLUGIN.weights(path)
    for module, folder in (
        ("transformer", "high_noise_model"),
        ("transformer_2", "low_noise_model"),
    ):
        (tmp_path / folder).mkdir()
        tensors = weights[module].read(weights[module].describe())
        moved = {to_original(name): tensor + 1 for name, tensor in tensors.items()}
        save_file(moved, tmp_path / folder / "diffusion_pytorch_model.safetensors")
    assert list(PLUGIN.start_problems(role, variant.config, str(tmp_path))) == []
    sources = PLUGIN.start_weights(role, str(tmp_path))
    for module, source in weights.items():
        old, new = (x.read(x.describe()) for x in (source, sources[module]))
        assert equal(new, {name: tensor + 1 for name, tensor in old.items()})
    one = tmp_path / "high_noise_model/diffusion_pytorch_model.safetensors"
    text = problem(role, variant.config, one)
    assert "holds weights of transformer, and" in text
    assert "is built of transformer, transformer_2" in text


def test_the_error_of_a_wrong_start_has_a_reason(base, role, config, tmp_path):
    _, other = base
    file = tmp_path / "x.safetensors"
    save_file({"unet.down.weight": torch.ones(2), **other}, file)
    assert "1 of" in problem(role, config, file)
    assert "unet.down.weight" in problem(role, config, file)
    save_file({k: v for k, v in other.items() if k != "proj_out.bias"}, file)
    assert "1 missing: proj_out.bias" in problem(role, config, file)
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in other.items()}, file)
    assert "is stored as F8_E4M3; only 16 bits and more" in problem(role, config, file)
    for name in ("wan-Q4_K_M.gguf", "gguf/wan.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"GGUF")
    for path in (tmp_path / "wan-Q4_K_M.gguf", tmp_path / "gguf", "city96/Wan2.1-T2V-14B-gguf"):
        text = problem(role, config, path)
        assert "GGUF weights" in text
        assert "16-bit" in text
        assert "download" not in text.lower()
    (tmp_path / "student.pt").write_bytes(b"x")
    assert f"apps/migrate --from {tmp_path / 'student.pt'}" in problem(
        role, config, tmp_path / "student.pt"
    )
    (tmp_path / "fv/distributed_checkpoint").mkdir(parents=True)
    assert "apps/migrate --from" in problem(role, config, tmp_path / "fv")
    (tmp_path / "two").mkdir()
    for name in "ab":
        save_file(other, tmp_path / f"two/{name}.safetensors")
    assert "several models (a.safetensors, b.safetensors)" in problem(
        role, config, tmp_path / "two"
    )


# -- LoRA -----------------------------------------------------------------------------------------

LAYERS = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj", "proj_out")


def factors(own, rank=2):
    generator = torch.Generator().manual_seed(9)
    return {
        layer: (
            torch.randn(rank, own[f"{layer}.weight"].shape[1], generator=generator),
            torch.randn(own[f"{layer}.weight"].shape[0], rank, generator=generator),
        )
        for layer in LAYERS
    }


def original(layer: str) -> str:
    return to_original(f"{layer}.weight").removesuffix(".weight")


FORMS = {
    "diffusers": ("transformer.{ours}.lora_A.weight", "transformer.{ours}.lora_B.weight"),
    "peft": ("base_model.model.{ours}.lora_A.weight", "base_model.model.{ours}.lora_B.weight"),
    "comfy": ("diffusion_model.{theirs}.lora_A.weight", "diffusion_model.{theirs}.lora_B.weight"),
    "down-up": (
        "diffusion_model.{theirs}.lora_down.weight",
        "diffusion_model.{theirs}.lora_up.weight",
    ),
    "musubi": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [None, "in the file", "beside it"])
def test_a_lora_of_any_code_is_merged_into_the_roles_path(
    base, role, config, tmp_path, form, alpha
):
    own, _ = base
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for layer, pair in factors(own).items():
        flat = original(layer).replace(".", "_")
        names = [f.format(ours=layer, theirs=original(layer), flat=flat) for f in FORMS[form]]
        tensors |= dict(zip(names, pair, strict=True))
        if alpha == "in the file":
            tensors[names[0].rpartition(".lora_")[0] + ".alpha"] = torch.tensor(3.0)
    if alpha == "beside it" and form == "peft":
        lora_metadata = {"r": 2, "lora_alpha": 3.0, "alpha_pattern": {}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(lora_metadata))
    elif alpha == "beside it":
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 3.0})}
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, metadata)
    actual = start_role(role, config, file)
    scale = 1.0 if alpha is None else 3.0 / 2
    expected = dict(own)
    for layer, (a, b) in factors(own).items():
        expected[f"{layer}.weight"] = own[f"{layer}.weight"] + scale * (b @ a)
    assert equal(actual, expected)
    assert PLUGIN.starts_with_adapters(str(file))
    # A folder is the same, under whatever name the file has.
    assert equal(start_role(role, config, tmp_path), expected)


def test_an_exported_fine_tune_comes_back_whole(base, role, config, tmp_path):
    """LoRA of full rank but one, biases, norms and tables: from our own ComfyUI file."""
    from distill_protocols import ExportRequest, SamplerSpec, TensorWeights

    own, other = base
    low = {k: own[k] + (1.0 if v.dim() == 2 else v - own[k]) for k, v in other.items()}
    exporter = PLUGIN.exporter(config, source=role.path)
    request = ExportRequest(sampler=SamplerSpec(steps=1), format="lora", lora_rank=2)
    weights: dict[str, WeightSource] = {"transformer": TensorWeights("x", low)}
    exporter.export(role, weights, tmp_path / "s", request)
    tensors = start_role(role, config, tmp_path / "s/s-comfyui.safetensors")
    for name, value in low.items():
        torch.testing.assert_close(tensors[name], value, rtol=1e-5, atol=1e-5)
    # diffusers' own file, which the folder stands for, has no norms and tables.
    folder = start_role(role, config, tmp_path / "s")
    torch.testing.assert_close(folder["proj_out.bias"], low["proj_out.bias"])
    assert torch.equal(folder["blocks.0.norm2.weight"], own["blocks.0.norm2.weight"])


def test_a_lora_is_the_start_of_a_role_with_the_same_lora(base, role, config, tmp_path):
    own, _ = base
    spec = LoraSpec(rank=2, alpha=8, target_modules=LAYERS)
    student = attrs.evolve(role, lora=spec)
    tensors = {
        f"transformer.{layer}.lora_{side}.weight": x
        for layer, pair in factors(own).items()
        for side, x in zip("AB", pair, strict=True)
    }
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file)
    parameters = start_role(student, config, tmp_path)
    for layer, (a, b) in factors(own).items():
        assert torch.equal(parameters[f"{layer}.lora_A.default.weight"], a)
        assert torch.equal(parameters[f"{layer}.lora_B.default.weight"] * 4, b)  # alpha / rank = 4
        assert torch.equal(parameters[f"{layer}.base_layer.weight"], own[f"{layer}.weight"])
    other = attrs.evolve(role, lora=attrs.evolve(spec, rank=4))
    assert "is of rank 2 and the role's of 4" in problem(other, config, file)
    other = attrs.evolve(role, lora=attrs.evolve(spec, target_modules=LAYERS[:1]))
    assert "is on 3 layers and the role's on 1" in problem(other, config, file)
    key = "diffusion_model.norm3.diff_b"
    save_file(tensors | {"transformer.proj_out.lora_B.bias": own["proj_out.bias"]}, file)
    assert "changes 1 biases" in problem(student, config, file)
    assert key not in tensors


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"transformer.proj_out.lora_B.weight": None}, "half of one"),
        ({"transformer.blocks.9.attn1.to_q.lora_A.weight": torch.ones(2, 24)}, "of another model"),
        ({"transformer.proj_out.dora_scale": torch.ones(3)}, "another kind of adapter"),
        ({"transformer.proj_out.lora_B.weight": torch.ones(7, 2)}, "fits only the model"),
    ],
)
def test_a_lora_that_is_not_this_models_is_refused(base, role, config, tmp_path, change, why):
    own, _ = base
    tensors = {
        f"transformer.{layer}.lora_{side}.weight": x
        for layer, pair in factors(own).items()
        for side, x in zip("AB", pair, strict=True)
    } | change
    file = tmp_path / "lora.safetensors"
    save_file({name: x for name, x in tensors.items() if x is not None}, file)
    assert why in problem(role, config, file)


# -- as a run file has them -----------------------------------------------------------------------


def test_paths_that_are_files_or_quantised_say_what_to_write(base, role, config, tmp_path):
    _, other = base
    file = tmp_path / "wan.safetensors"
    save_file({to_original(k): v for k, v in other.items()}, file)
    (text,) = [p.message for p in PLUGIN.role_problems(attrs.evolve(role, path=str(file)), config)]
    assert "is a file" in text
    assert "this can be the weights that the role starts with" in text
    gguf = attrs.evolve(role, path="city96/Wan2.1-T2V-14B-gguf")
    (text,) = [p.message for p in PLUGIN.role_problems(gguf, config)]
    assert "GGUF weights" in text
    assert "hf download" not in text


def test_fp8_folders_are_refused_before_a_run(pipeline, config):
    file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(file).items()}, file)
    role = RoleSpec(name="student", path=str(pipeline), trainable=True)
    (text,) = [p.message for p in PLUGIN.role_problems(role, config)]
    assert "stored as F8_E4M3; only 16 bits and more can be trained from" in text


def test_fp8_weights_that_a_checkpoint_brings_are_refused(base, role, config):
    """Such as one that was migrated before migrations refused them."""

    class Narrow(WeightSource):
        where = "an old checkpoint"

        def describe(self) -> dict[str, TensorInfo]:
            return {k: TensorInfo(tuple(v.shape), torch.float8_e4m3fn) for k, v in base[0].items()}

        def read(self, names: Any) -> dict[str, torch.Tensor]:
            return {name: base[0][name].to(torch.float8_e4m3fn) for name in names}

    weights = {"student": {"transformer": Narrow()}}
    with pytest.raises(WeightsError, match="float8_e4m3fn; only 16 bits"):
        PLUGIN.load([role], config, device=CPU, weights=weights)
