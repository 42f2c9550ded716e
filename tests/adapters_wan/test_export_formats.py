"""ComfyUI files and LoRA files, read by stock readers; and that ``verify`` sees what is wrong."""

from __future__ import annotations

import json
import shutil

import attrs
import pytest
import torch
from distill_adapters_wan import PLUGIN
from distill_adapters_wan.names.original import to_original
from distill_diffusers.weights.extraction import extract, factors
from distill_diffusers.weights.starts import PatchedWeights
from distill_protocols import (
    ExportRequest,
    LoraSpec,
    RoleSpec,
    SamplerSpec,
    TensorWeights,
    WeightsError,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wan_variants import VARIANTS

SPEC = SamplerSpec(steps=2, timesteps=(1000.0, 700.0), stochastic=True)
LORA = LoraSpec(rank=4, alpha=6.0)
"""A scale of 1.5, which somebody might forget."""
LORA_FILE = "pytorch_lora_weights.safetensors"


class Trained:
    """A role that has moved from its base, and its exporter."""

    def __init__(self, config, source, lora=None):
        self.role = RoleSpec(name="student", path=str(source), trainable=True, lora=lora)
        self.exporter = PLUGIN.exporter(config, source=str(source))
        self.handle = PLUGIN.load([self.role], config, device=torch.device("cpu"))["student"]
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.handle.trained_parameters("transformer").values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        self.module = self.handle.modules["transformer"]
        # LoRA: the adapters alone, as a checkpoint holds them.
        self.weights = self.handle.weight_sources()

    def export(self, folder, **request):
        request = ExportRequest(sampler=SPEC, **request)
        return self.exporter.export(self.role, self.weights, folder, request)

    def verify(self, folder, **request):
        request = ExportRequest(sampler=SPEC, **request)
        return self.exporter.verify(self.role, self.weights, folder, request)


@pytest.fixture(scope="module")
def full(config, pipeline_template):
    return Trained(config, pipeline_template)


@pytest.fixture(scope="module")
def lora(config, pipeline_template):
    return Trained(config, pipeline_template, LORA)


def probe():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([1000.0, 640.0]),
        "encoder_hidden_states": torch.randn(2, 6, 16, generator=generator),
        "return_dict": False,
    }


@torch.no_grad()
def outputs(module):
    return module(**probe())[0]


def base_pipeline(source):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(source, subfolder="transformer")
    return WanPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )


# -- ComfyUI --------------------------------------------------------------------------------------


def test_a_comfyui_file_holds_the_role_under_the_original_names(full, tmp_path):
    record = full.export(tmp_path / "my-student", format="comfyui")
    file = tmp_path / "my-student" / "my-student.safetensors"
    assert {p.name for p in file.parent.iterdir()} == {file.name, "sampler_spec.json"}
    tensors = load_file(file)
    live = full.module.state_dict()
    assert {to_original(name): True for name in live} == dict.fromkeys(tensors, True)
    assert all(torch.equal(tensors[to_original(name)], value) for name, value in live.items())
    assert "head.modulation" in tensors  # by this ComfyUI and diffusers know a Wan
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
    assert metadata.keys() == {"format", "sampler_spec"}  # ComfyUI would obey a key "config"
    spec = json.loads(metadata["sampler_spec"])
    assert spec["sampler"]["timesteps"] == spec["timesteps"] == [1000.0, 700.0]
    assert json.loads((file.parent / "sampler_spec.json").read_text())["files"] == record["files"]
    assert any("attention_head_dim" in note for note in record["notes"])


def test_a_comfyui_file_gives_the_same_outputs_through_from_single_file(full, tmp_path):
    from diffusers import WanTransformer3DModel

    full.export(tmp_path / "s", format="comfyui")
    full.module.save_config(tmp_path / "config")
    loaded = WanTransformer3DModel.from_single_file(
        str(tmp_path / "s/s.safetensors"), config=str(tmp_path / "config")
    )
    assert torch.equal(outputs(loaded), outputs(full.module))


# -- LoRA -----------------------------------------------------------------------------------------


def test_a_lora_that_leaves_the_picture_alone_is_verified(folder_of, tmp_path):
    """diffusers gives the image attention of such a model adapters of zeros when it loads one."""
    role = Trained(VARIANTS["i2v-2.1"].config, folder_of("i2v-2.1"), LORA)
    role.export(tmp_path / "s", format="lora")
    assert not any("add_k_proj" in name for name in load_file(tmp_path / "s" / LORA_FILE))
    assert role.verify(tmp_path / "s", format="lora")["transformer"]["layers"] > 0
    broken = load_file(tmp_path / "s" / LORA_FILE)
    layer = next(name for name in broken if name.endswith("attn2.to_k.lora_B.weight"))
    broken[layer.replace("to_k", "add_k_proj")] = torch.ones_like(broken[layer])
    broken[layer.replace("to_k.lora_B", "add_k_proj.lora_A")] = torch.ones(4, 24)
    save_file(broken, tmp_path / "s" / LORA_FILE)
    with pytest.raises(WeightsError, match="unexpected"):
        role.verify(tmp_path / "s", format="lora")


@pytest.mark.parametrize("file", ["pytorch_lora_weights", "s-comfyui"])
def test_a_lora_file_gives_the_roles_outputs_on_the_stock_base(
    lora, pipeline_template, tmp_path, file
):
    lora.export(tmp_path / "s", format="lora")
    pipe = base_pipeline(pipeline_template)
    plain = outputs(pipe.transformer)
    if file == "pytorch_lora_weights":
        pipe.load_lora_weights(tmp_path / "s")
    else:
        pipe.load_lora_weights(tmp_path / "s", weight_name=f"{file}.safetensors")
    ours, theirs = outputs(lora.module), outputs(pipe.transformer)
    assert (theirs - ours).abs().max() < 1e-5 * ours.square().mean().sqrt()
    assert (plain - ours).abs().max() > 0.1


def test_lora_names_are_those_of_diffusers_own_save(lora, tmp_path):
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    lora.export(tmp_path / "ours", format="lora")
    layers = get_peft_model_state_dict(lora.module)
    WanPipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=layers)
    name = "pytorch_lora_weights.safetensors"
    ours, theirs = load_file(tmp_path / "ours" / name), load_file(tmp_path / "theirs" / name)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value * (1.5 if "lora_B" in key else 1))


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_a_lora_role_is_merged_into_its_base(lora, tmp_path, format):
    """Against peft's own merge, bit for bit."""
    import copy

    from distill_diffusers.lora import base_name
    from peft.tuners.lora import LoraLayer

    lora.export(tmp_path / "s", format=format)
    merged = copy.deepcopy(lora.module)
    for layer in merged.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
    state = {base_name(k): v for k, v in merged.state_dict().items() if "lora_" not in k}
    if format == "diffusers":
        tensors = load_file(tmp_path / "s/transformer/diffusion_pytorch_model.safetensors")
    else:
        tensors = load_file(tmp_path / "s/s.safetensors")
        state = {to_original(k): v for k, v in state.items()}
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[k], v) for k, v in state.items())


def test_a_16_bit_base_does_not_swallow_the_update(pipeline, config, tmp_path):
    """B A of 1e-4 beside weights of 1 is less than half a bf16 step of 0.0078."""
    file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file)
    trained = Trained(config, pipeline, LORA)
    trained.export(tmp_path / "s")
    tensors = load_file(tmp_path / "s/transformer/diffusion_pytorch_model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.float32
    assert kinds["blocks.0.attn1.to_q.bias"] == torch.bfloat16
    trained.verify(tmp_path / "s")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31))
def test_factors_are_the_best_of_their_rank(rows, columns, rank, seed):
    """Eckart & Young: the error is the singular values that were cut off."""
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    a, b = factors(delta, rank, seed=0)
    assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
    cut = torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt()
    error = torch.linalg.vector_norm(delta.double() - b.double() @ a.double())
    assert abs(error - cut) < 1e-5 * (1 + torch.linalg.vector_norm(delta))


def test_large_layers_are_cut_off_by_a_generator_of_their_own():
    generator = torch.Generator().manual_seed(0)
    decay = 0.9 ** torch.arange(60.0)
    left, right = (torch.randn(n, 60, generator=generator) / n**0.5 for n in (1100, 1030))
    delta = (left * decay) @ right.T + 1e-3 * torch.randn(1100, 1030, generator=generator) / 33
    before = torch.get_rng_state()
    a, b = factors(delta, 16, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again = factors(delta, 16, seed=3)
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    best = torch.linalg.svdvals(delta)[16:].square().sum().sqrt()
    assert torch.linalg.vector_norm(delta - b @ a) < 1.001 * best


def test_a_fine_tune_of_low_rank_is_found_whole(config, pipeline_template, full, tmp_path):
    """The difference of two adapters merged is of rank 4: nothing is lost at 4, something at 2."""
    trained = Trained(config, pipeline_template, LORA)
    trained.export(tmp_path / "merged")
    merged = load_file(tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors")
    merged_role = {"transformer": TensorWeights("merged", merged)}
    role = attrs.evolve(trained.role, lora=None)
    errors = {}
    for rank in (4, 2):
        request = ExportRequest(sampler=SPEC, format="lora", lora_rank=rank)
        record = trained.exporter.export(role, merged_role, tmp_path / f"r{rank}", request)
        errors[rank] = record["lora"]["transformer"]["relative_error"]
        assert record["lora"]["transformer"]["layers"] == 20
        assert record["lora"]["transformer"]["biases"] == {}
        assert record["lora"]["transformer"]["differences"] == {}
        trained.exporter.verify(role, merged_role, tmp_path / f"r{rank}", request)
    assert errors[4] < 1e-5
    assert 0.1 < errors[2] < 0.9


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_extracted_adapters_of_other_weights_do_not_pass(full, tmp_path, precision):
    request = {"format": "lora", "lora_rank": 6, "precision": precision}
    full.export(tmp_path / "s", **request)
    full.verify(tmp_path / "s", **request)
    for file in (tmp_path / "s").glob("*.safetensors"):
        # Both files alike, so that their outputs agree with each other.
        halves = {n: t / 2 if ".lora_B." in n else t for n, t in load_file(file).items()}
        save_file(halves, file, {"format": "pt"})
    with pytest.raises(WeightsError, match="not those of the role"):
        full.verify(tmp_path / "s", **request)


def test_changed_vectors_are_stored_beside_the_adapters(full, pipeline_template, tmp_path):
    """Biases of linear layers in both files; norms, tables and the patch embedding as ComfyUI reads
    them. Nothing is left out."""
    record = full.export(tmp_path / "s", format="lora", lora_rank=23)
    reported = record["lora"]["transformer"]
    state = full.module.state_dict()
    base = PLUGIN.weights(str(pipeline_template))["transformer"]
    old = base.read(base.describe())
    linear = {n for n, m in full.module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(reported["by_layer"]) == linear
    assert reported["biases"].keys() == {f"{layer}.bias" for layer in linear}
    rest = state.keys() - {f"{layer}.{kind}" for layer in linear for kind in ("weight", "bias")}
    assert reported["differences"].keys() == rest
    assert {"patch_embedding.weight", "blocks.0.norm2.bias", "scale_shift_table"} <= rest
    assert all(0 < change <= 1.5 for change in reported["differences"].values())
    assert any("s-comfyui.safetensors has them as .diff" in note for note in record["notes"])

    comfy = load_file(tmp_path / "s/s-comfyui.safetensors")
    ours = load_file(tmp_path / "s/pytorch_lora_weights.safetensors")
    # By ComfyUI's own rule (comfy/weight_adapter and comfy/lora.py): x.diff goes onto x.weight, or
    # onto x where that is a parameter itself, and x.diff_b onto x.bias.
    rebuilt = {to_original(name): tensor.clone() for name, tensor in old.items()}
    for key, tensor in comfy.items():
        name = key.removeprefix("diffusion_model.")
        if name.endswith(".diff"):
            name = name.removesuffix(".diff")
            rebuilt[f"{name}.weight" if f"{name}.weight" in rebuilt else name] += tensor
        elif name.endswith(".diff_b"):
            rebuilt[f"{name.removesuffix('.diff_b')}.bias"] += tensor
        elif name.endswith(".lora_A.weight"):
            layer, b = name.removesuffix(".lora_A.weight"), key.replace("lora_A", "lora_B")
            rebuilt[f"{layer}.weight"] += comfy[b] @ tensor
    for name, value in state.items():
        # 23 of 24 directions of a weight are there, and all of everything else.
        most = 1e-6 if name in rest or name.endswith(".bias") else 0.3
        actual = rebuilt[to_original(name)]
        assert (actual - value).norm() <= most * (value - old[name]).norm(), name
    assert all("lora" in key for key in ours)  # load_lora_weights refuses a file with other names
    assert sum(key.endswith(".lora_B.bias") for key in ours) == len(linear)

    # Through stock diffusers, from either file: the same, and nearer to the role's outputs.
    full.verify(tmp_path / "s", format="lora", lora_rank=23)
    expected, actual = outputs(full.module), {}
    for file in ("pytorch_lora_weights", "s-comfyui"):
        pipe = base_pipeline(pipeline_template)
        pipe.load_lora_weights(tmp_path / "s", weight_name=f"{file}.safetensors")
        actual[file] = outputs(pipe.transformer)
        layer = pipe.transformer.blocks[0].ffn.net[2]
        torch.testing.assert_close(
            layer.lora_B["default_0"].bias.data,
            state["blocks.0.ffn.net.2.bias"] - old["blocks.0.ffn.net.2.bias"],
        )
    assert torch.equal(*actual.values())
    without = tmp_path / "without"
    without.mkdir()
    save_file({k: v for k, v in ours.items() if "bias" not in k}, without / "x.safetensors")
    pipe = base_pipeline(pipeline_template)
    pipe.load_lora_weights(without, weight_name="x.safetensors")
    errors = [
        float((x - expected).norm()) for x in (actual["s-comfyui"], outputs(pipe.transformer))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_a_bias_alone_comes_with_empty_factors(pipeline_template):
    base = PLUGIN.weights(str(pipeline_template))["transformer"]
    state = base.read(base.describe())
    state["proj_out.bias"] = state["proj_out.bias"] + 1
    state["blocks.0.scale_shift_table"] = state["blocks.0.scale_shift_table"] + 1
    extraction = extract(TensorWeights("x", state), base, 2, precision="bf16")
    assert extraction.factors.keys() == extraction.biases.keys() == {"proj_out"}
    assert not any(factor.any() for factor in extraction.factors["proj_out"])
    assert torch.equal(
        extraction.biases["proj_out"], torch.ones_like(extraction.biases["proj_out"])
    )
    assert extraction.biases["proj_out"].dtype == torch.bfloat16
    assert extraction.differences.keys() == {"blocks.0.scale_shift_table"}


@pytest.mark.parametrize(
    "key", ["diffusion_model.blocks.0.norm3.diff", "diffusion_model.head.head.diff_b"]
)
def test_a_difference_that_is_not_the_roles_is_noticed(full, tmp_path, key):
    full.export(tmp_path / "s", format="lora", lora_rank=4)
    file = tmp_path / "s/s-comfyui.safetensors"
    tensors = load_file(file)
    save_file(tensors | {key: tensors[key] + 0.5}, file)
    with pytest.raises(WeightsError, match="not those of the role"):
        full.verify(tmp_path / "s", format="lora", lora_rank=4)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
    with pytest.raises(WeightsError, match=f"{key} missing"):
        full.verify(tmp_path / "s", format="lora", lora_rank=4)


def test_the_reported_error_is_that_of_the_file(full, pipeline_template, tmp_path):
    record = full.export(tmp_path / "s", format="lora", lora_rank=6, precision="bf16")
    file = load_file(tmp_path / "s/pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in file.values()} == {torch.bfloat16}
    base = PLUGIN.weights(str(pipeline_template))["transformer"]
    state = full.module.state_dict()
    lost = norm = 0.0
    for layer, reported in record["lora"]["transformer"]["by_layer"].items():
        name = f"{layer}.weight"
        delta = (state[name] - base.read([name])[name]).double()
        a, b = (file[f"transformer.{layer}.lora_{side}.weight"].double() for side in "AB")
        error = (delta - b @ a).norm()
        assert reported["relative_error"] == pytest.approx(float(error / delta.norm()), rel=1e-4)
        lost, norm = lost + error**2, norm + delta.norm() ** 2
    reported = record["lora"]["transformer"]["relative_error"]
    assert reported == pytest.approx(float((lost / norm).sqrt()), rel=1e-4)


def test_a_layer_that_did_not_change_gets_no_adapter(pipeline_template):
    base = PLUGIN.weights(str(pipeline_template))["transformer"]
    state = base.read(base.describe())
    state["proj_out.weight"] = state["proj_out.weight"] + 1
    extraction = extract(TensorWeights("x", state), base, 2)
    assert set(extraction.factors) == {"proj_out"}
    assert extraction.relative_error < 1e-5  # a matrix of ones has rank 1


def test_a_role_that_is_its_base_makes_no_lora(config, pipeline_template, tmp_path):
    source = str(pipeline_template)
    role = RoleSpec(name="student", path=source, trainable=True)
    request = ExportRequest(sampler=SPEC, format="lora", lora_rank=2)
    exporter = PLUGIN.exporter(config, source=source)
    with pytest.raises(WeightsError, match="no linear layer differs"):
        exporter.export(role, PLUGIN.weights(source), tmp_path / "s", request)
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_another_rank_are_refused(lora, tmp_path):
    role = attrs.evolve(lora.role, lora=LoraSpec(rank=8))
    for format in ("diffusers", "comfyui", "lora"):
        request = ExportRequest(sampler=SPEC, format=format)
        with pytest.raises(WeightsError, match=r"\[4, 24\] instead of \[8, 24\]"):
            lora.exporter.export(role, lora.weights, tmp_path / "s", request)
    with pytest.raises(WeightsError, match=r"lora_A.*unexpected|unexpected.*lora_A"):
        lora.exporter.export(
            attrs.evolve(lora.role, lora=None),
            lora.weights,
            tmp_path / "s",
            ExportRequest(sampler=SPEC),
        )
    assert list(tmp_path.iterdir()) == []


# -- verify ---------------------------------------------------------------------------------------

REQUESTS = [
    ("full", {}),
    ("full", {"precision": "bf16", "max_shard_bytes": 20_000}),
    ("full", {"format": "comfyui"}),
    ("full", {"format": "comfyui", "precision": "fp16"}),
    ("full", {"format": "lora", "lora_rank": 3}),
    ("lora", {}),
    ("lora", {"format": "comfyui", "precision": "bf16"}),
    ("lora", {"format": "lora"}),
    ("lora", {"format": "lora", "precision": "bf16"}),
]


@pytest.mark.parametrize(("which", "request_"), REQUESTS)
def test_a_good_export_passes_and_a_damaged_one_is_named(request, tmp_path, which, request_):
    trained = request.getfixturevalue(which)
    folder = tmp_path / "s"
    trained.export(folder, **request_)
    before = torch.get_rng_state()
    record = trained.verify(folder, **request_)
    assert torch.equal(torch.get_rng_state(), before)
    differences = record["transformer"]
    if request_.get("format") == "lora":
        assert 0 < differences["largest_difference"] < 1e-5
    else:
        assert differences["largest_difference"] == 0
        assert differences["tensors"] == 69
    file = max(
        (f for f in folder.rglob("*.safetensors") if f.parent.name in ("s", "transformer")),
        key=lambda f: ("comfyui" not in f.name, f.stat().st_size),
    )
    full = load_file(file)
    name = next(name for name in sorted(full) if full[name].dim() == 2)

    bumped = full[name].clone()
    bumped[0, 0] += 0.25
    save_file({**full, name: bumped}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"not those of the role|different outputs"):
        trained.verify(folder, **request_)

    save_file({k: v for k, v in full.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing|other half"):
        trained.verify(folder, **request_)

    save_file({**full, "stray.weight": torch.zeros(2)}, file, {"format": "pt"})
    if "max_shard_bytes" not in request_:  # what no index names is not read
        with pytest.raises(WeightsError, match=r"stray"):
            trained.verify(folder, **request_)


def test_verify_sees_a_changed_configuration_and_another_sampler(full, tmp_path):
    full.export(tmp_path / "s")
    file = tmp_path / "s/transformer/config.json"
    text = file.read_text()
    file.write_text(text.replace('"eps": 1e-06', '"eps": 0.01'))
    with pytest.raises(WeightsError, match=r"outputs differ.*config\.json"):
        full.verify(tmp_path / "s")
    file.write_text(text)
    full.verify(tmp_path / "s")
    request = ExportRequest(sampler=attrs.evolve(SPEC, timesteps=(1000.0, 500.0)))
    with pytest.raises(WeightsError, match="another sampler"):
        full.exporter.verify(full.role, full.weights, tmp_path / "s", request)
    with pytest.raises(WeightsError, match="no folder"):
        full.verify(tmp_path / "absent")


# -- problems of a request -----------------------------------------------------------------------


def problems(role, **request):
    problems = PLUGIN.export_problems(role, ExportRequest(sampler=SPEC, **request))
    return {".".join(p.path): p.message for p in problems}


def test_impossible_export_requests_are_refused(full, lora, tmp_path):
    whole, adapted = full.role, lora.role
    for role in (whole, adapted):
        assert problems(role) == {}
        assert problems(role, format="comfyui", precision="bf16") == {}
    assert problems(whole, format="lora", lora_rank=4) == {}
    assert problems(adapted, format="lora") == {}
    assert "missing: role 'student' is no LoRA" in problems(whole, format="lora")["lora_rank"]
    assert "LoRA of rank 4" in problems(adapted, format="lora", lora_rank=8)["lora_rank"]
    assert (
        "no effect on format 'comfyui'"
        in problems(whole, format="comfyui", lora_rank=8)["lora_rank"]
    )
    assert "at least 1" in problems(whole, format="lora", lora_rank=0)["lora_rank"]
    # 24 of a width of 24; the largest smaller side is that of time_proj and ffn.
    assert "above 24" in problems(whole, format="lora", lora_rank=25)["lora_rank"]
    assert "'gguf' is none of" in problems(whole, format="gguf")["format"]
    assert "'fp8' is none of" in problems(whole, precision="fp8")["precision"]
    assert "at least 1" in problems(whole, max_shard_bytes=0)["max_shard_bytes"]
    with pytest.raises(WeightsError, match="lora_rank: missing"):
        full.export(tmp_path / "s", format="lora")


def test_a_base_without_weights_is_refused_where_they_are_needed(full, lora, tmp_path):
    folder = tmp_path / "configuration-alone"
    shutil.copytree(full.role.path, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    without = {"path": str(folder)}
    assert "merged into" in problems(attrs.evolve(lora.role, **without))["format"]
    assert problems(attrs.evolve(lora.role, **without), format="lora") == {}
    needs = problems(attrs.evolve(full.role, **without), format="lora", lora_rank=8)
    assert "difference" in needs["format"]
    assert problems(attrs.evolve(full.role, **without)) == {}
    # A hub id that is not downloaded yet can be planned; loading it raises.
    hub = {"path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}
    assert problems(attrs.evolve(lora.role, **hub)) == {}
    assert problems(attrs.evolve(full.role, **hub), format="lora", lora_rank=32) == {}


# -- two experts ----------------------------------------------------------------------------------


@pytest.fixture
def experts(pipeline, config):
    """(role, weights) of a folder with two transformers, each of which has moved its own way."""
    shutil.copytree(pipeline / "transformer", pipeline / "transformer_2")
    index = json.loads((pipeline / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    role = RoleSpec(name="student", path=str(pipeline), trainable=True)
    weights = {}
    for seed, (name, source) in enumerate(PLUGIN.weights(role.path).items()):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            key: value + 0.05 * torch.randn(value.shape, generator=generator)
            for key, value in source.read(source.describe()).items()
        }
        weights[name] = TensorWeights(name, moved)
    return role, weights


@pytest.mark.parametrize(
    ("format", "files"),
    [
        ("diffusers", None),
        ("comfyui", {"s.safetensors", "s-transformer_2.safetensors"}),
        (
            "lora",
            {
                "pytorch_lora_weights.safetensors",
                "pytorch_lora_weights-transformer_2.safetensors",
                "s-comfyui.safetensors",
                "s-comfyui-transformer_2.safetensors",
            },
        ),
    ],
)
def test_two_experts_are_two_of_everything(experts, config, tmp_path, format, files):
    role, weights = experts
    exporter = PLUGIN.exporter(config, source=role.path)
    rank = 2 if format == "lora" else None
    request = ExportRequest(sampler=SPEC, format=format, lora_rank=rank)
    record = exporter.export(role, weights, tmp_path / "s", request)
    assert exporter.verify(role, weights, tmp_path / "s", request).keys() >= weights.keys()
    if files is not None:
        assert set(record["files"]) == files
        back = PLUGIN.start_weights(role, str(tmp_path / "s"))
        assert back.keys() == weights.keys()
        if format == "comfyui":
            for name, source in weights.items():
                read = back[name].read(source.tensors)
                assert all(torch.equal(read[k], value) for k, value in source.tensors.items())
        return
    index = json.loads((tmp_path / "s/model_index.json").read_text())
    assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    assert index["boundary_ratio"] == 0.875
    for name, source in weights.items():
        tensors = load_file(tmp_path / "s" / name / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensors[key], value) for key, value in source.tensors.items())


def test_an_expert_that_never_moved_is_left_out_of_a_lora(experts, config, tmp_path):
    """A method may train one of two; the other has nothing that adapters could hold."""
    role, weights = experts
    weights = {**weights, "transformer": PLUGIN.weights(role.path)["transformer"]}
    exporter = PLUGIN.exporter(config, source=role.path)
    request = ExportRequest(sampler=SPEC, format="lora", lora_rank=2)
    record = exporter.export(role, weights, tmp_path / "s", request)
    assert set(record["files"]) == {
        "pytorch_lora_weights-transformer_2.safetensors",
        "s-comfyui-transformer_2.safetensors",
    }
    assert any("transformer: no weight differs" in note for note in record["notes"])
    checked = exporter.verify(role, weights, tmp_path / "s", request)
    assert checked["transformer"]["layers"] == 0
    assert checked["transformer_2"]["layers"] > 0
    back = PLUGIN.start_weights(role, str(tmp_path / "s"))
    source = weights["transformer"]
    read = back["transformer"].read(source.describe())
    assert all(torch.equal(v, read[n]) for n, v in source.read(source.describe()).items())
    assert isinstance(back["transformer_2"], PatchedWeights)
    # A file that is lost is no expert that never moved.
    wider = {**record, "files": {**record["files"], "pytorch_lora_weights.safetensors": 1}}
    (tmp_path / "s" / "sampler_spec.json").write_text(json.dumps(wider))
    with pytest.raises(WeightsError, match="holds weights of transformer_2"):
        PLUGIN.start_weights(role, str(tmp_path / "s"))
    for file in record["files"]:
        (tmp_path / "s" / file).unlink()
    with pytest.raises(WeightsError, match=r"is missing, and .* differs from the base's"):
        exporter.verify(role, weights, tmp_path / "s", request)
