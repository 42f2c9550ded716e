"""Weights arrive whole, in the right precision and independent, or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from distill_adapters_wan import PLUGIN, WAN
from distill_diffusers.roles.injection import InitialAdapters
from distill_diffusers.weights.sources import (
    FileWeights,
    JoinedWeights,
    folder_weights,
    read_in_groups,
)
from distill_protocols import RoleSpec, TensorInfo, TensorWeights, WeightsError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")


def load(pipeline, config, **kwargs):
    spec = RoleSpec(name="r", path=str(pipeline), **{"trainable": True, **kwargs})
    return PLUGIN.load([spec], config, device=CPU)["r"]


def edit(pipeline, change):
    file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def test_the_same_outputs_as_diffusers_own_loading(pipeline, config):
    """Outputs, not state dicts: the rotary tables are in no state dict."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(pipeline / "transformer").eval()
    ours = load(pipeline, config).modules["transformer"].eval()
    x = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    args = {"timestep": torch.tensor([600.0]), "encoder_hidden_states": text, "return_dict": False}
    with torch.no_grad():
        expected = theirs(x, **args)[0]
        assert expected.std() > 0.01
        # Not bitwise: theirs stays in the mapped file, whose alignment picks other kernels.
        assert torch.equal(ours.rope.freqs_cos, theirs.rope.freqs_cos)
        assert torch.equal(ours.rope.freqs_sin, theirs.rope.freqs_sin)
        assert torch.allclose(ours(x, **args)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda w: w.pop("proj_out.bias"), "1 missing: proj_out.bias"),
        (lambda w: w.update(stray=torch.zeros(2)), "1 unexpected: stray"),
        (lambda w: w.update({"proj_out.bias": torch.zeros(3)}), r"proj_out.bias \[3\] instead of"),
    ],
)
def test_unmatched_keys_are_named(pipeline, config, change, kind):
    edit(pipeline, change)
    with pytest.raises(WeightsError, match=kind):
        load(pipeline, config)


def test_all_unmatched_keys_are_named_at_once(pipeline, config):
    def change(weights):
        weights["stray"] = weights.pop("proj_out.weight")

    edit(pipeline, change)
    with pytest.raises(WeightsError, match=r"missing: proj_out.weight.*unexpected: stray"):
        load(pipeline, config)


def test_a_truncated_file_is_named(pipeline, config):
    file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=str(file)):
        load(pipeline, config)


def test_a_damaged_config_is_named(pipeline, config):
    (pipeline / "transformer/config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        load(pipeline, config)


def test_roles_of_one_path_share_nothing(pipeline, config):
    specs = [
        RoleSpec(name=name, path=str(pipeline), trainable=name != "teacher")
        for name in ("student", "teacher", "critic")
    ]
    bundle = PLUGIN.load(specs, config, device=CPU)
    before = [p.clone() for p in bundle["teacher"].modules["transformer"].parameters()]
    on_disk = (pipeline / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in bundle["student"].modules["transformer"].parameters():
            parameter.fill_(9.0)
    for name in ("teacher", "critic"):
        now = bundle[name].modules["transformer"].parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert (pipeline / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == on_disk


def test_precision_and_mode(pipeline, config):
    frozen = load(pipeline, config, trainable=False, precision="bf16").modules["transformer"]
    for name, parameter in frozen.named_parameters():
        wide = {"time_embedder", "norm2", "scale_shift_table"} & set(name.split("."))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert {b.dtype for b in frozen.buffers()} == {torch.float32}
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = load(pipeline, config, trainable=True, precision="bf16").modules["transformer"]
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert trained.training
    assert all(p.requires_grad for p in trained.parameters())


def test_a_two_expert_folder_is_refused(pipeline, config):
    import shutil

    shutil.copytree(pipeline / "transformer", pipeline / "transformer_2")
    file = pipeline / "model_index.json"
    index = json.loads(file.read_text())
    index["transformer_2"] = index["transformer"]
    file.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="experts"):
        load(pipeline, config)


# -- weights of another place -----------------------------------------------------------------


def shift_weights(pipeline, by: float = 1.0):
    """Return the folder's weights, each of them changed."""
    weights = load_file(pipeline / "transformer/diffusion_pytorch_model.safetensors")
    return TensorWeights("shifted", {name: value + by for name, value in weights.items()})


def load_from(pipeline, config, source, **kwargs):
    spec = RoleSpec(name="r", path=str(pipeline), **{"trainable": True, **kwargs})
    weights = {"r": {"transformer": source}}
    return PLUGIN.load([spec], config, device=CPU, weights=weights)["r"]


@pytest.mark.parametrize(("trainable", "precision"), [(True, "bf16"), (False, "bf16")])
def test_given_weights_are_taken_instead_of_the_paths(pipeline, config, trainable, precision):
    kwargs = {"trainable": trainable, "precision": precision}
    source = shift_weights(pipeline)
    own = load(pipeline, config, **kwargs).modules["transformer"]
    (pipeline / "transformer/diffusion_pytorch_model.safetensors").unlink()
    given = load_from(pipeline, config, source, **kwargs).modules["transformer"].state_dict()
    for name, value in own.state_dict().items():
        assert given[name].dtype == value.dtype, name
        assert torch.equal(given[name], source.tensors[name].to(value.dtype)), name
        assert given[name].data_ptr() != source.tensors[name].data_ptr(), name


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda w: w.pop("proj_out.bias"), "1 missing: proj_out.bias"),
        (lambda w: w.update(stray=torch.zeros(2)), "1 unexpected: stray"),
        (lambda w: w.update({"proj_out.bias": torch.zeros(3)}), r"proj_out.bias \[3\] instead of"),
        (lambda w: w.clear(), r"missing: .* and \d+ more"),
    ],
)
def test_given_weights_that_do_not_fit_are_named(pipeline, config, change, kind):
    source = shift_weights(pipeline)
    change(source.tensors)
    with pytest.raises(WeightsError, match=f"^shifted: .*{kind}"):
        load_from(pipeline, config, source)


def test_weights_for_an_unknown_role_are_refused(pipeline, config):
    spec = RoleSpec(name="r", path=str(pipeline), trainable=True)
    source = shift_weights(pipeline)
    with pytest.raises(WeightsError, match="given for studnt, but the roles are r"):
        PLUGIN.load([spec], config, device=CPU, weights={"studnt": {"transformer": source}})
    with pytest.raises(WeightsError, match=r"transformer_2 of role 'r'"):
        PLUGIN.load([spec], config, device=CPU, weights={"r": {"transformer_2": source}})


@pytest.mark.parametrize("shard", ["10GB", "40KB"])
def test_a_folders_weights_are_a_source(pipeline, config, shard):
    handle = load(pipeline, config)
    module = handle.modules["transformer"]
    with torch.no_grad():
        module.proj_out.bias.fill_(5.0)
    (pipeline / "transformer/diffusion_pytorch_model.safetensors").unlink()
    module.save_pretrained(pipeline / "transformer", max_shard_size=shard)
    assert (len(list((pipeline / "transformer").glob("*.safetensors"))) > 1) == (shard == "40KB")
    sources = PLUGIN.weights(str(pipeline))
    assert set(sources) == {"transformer"}
    source = sources["transformer"]
    assert source.where == str(pipeline / "transformer")
    state = module.state_dict()
    assert dict(source.describe()) == {
        name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()
    }
    names = ["proj_out.bias", "patch_embedding.weight"]
    assert {n: v.tolist() for n, v in source.read(names).items()} == {
        name: state[name].tolist() for name in names
    }
    again = load_from(pipeline, config, source).modules["transformer"].state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_weights_that_are_not_there_or_damaged(pipeline, tmp_path):
    with pytest.raises(WeightsError, match="no folder"):
        PLUGIN.weights(str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=r"hf download Wan-AI/Wan2\.1-T2V-14B-Diffusers"):
        PLUGIN.weights("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=str(file)):
        folder_weights(str(pipeline), WAN.modules)
    (pipeline / "model_index.json").unlink()
    with pytest.raises(WeightsError, match=r"model_index\.json"):
        PLUGIN.weights(str(pipeline))


def test_ambiguous_or_quantised_weights_are_refused(tmp_path):
    for name in "ab":
        save_file({"x": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="which one counts"):
        FileWeights("w", sorted(tmp_path.glob("*.safetensors")))
    save_file({"x": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "q.safetensors")
    with pytest.raises(WeightsError, match="x is stored as F8_E4M3"):
        FileWeights("w", [tmp_path / "q.safetensors"])


@given(sizes=st.lists(st.integers(1, 40), max_size=20), most=st.integers(1, 200))
def test_weights_are_read_in_groups(sizes, most):
    """No more at once than ``most`` bytes or one tensor, and each just once."""
    reads = []

    class Source(TensorWeights):
        def read(self, names):
            names = list(names)
            reads.append([self.describe()[name].nbytes for name in names])
            return super().read(names)

    tensors = {str(i): torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    groups = list(read_in_groups(Source("w", tensors), tensors, most))
    assert len(groups) == len(sizes)
    assert all(torch.equal(tensors[name], value) for name, value in groups)
    assert all(len(read) <= 1 or sum(read) <= most for read in reads)


@given(st.integers(0, 24), st.integers(0, 24))
def test_rows_of_a_tensor_are_those_of_the_whole(pipeline_template, one, other):
    """Of files by slices, of any other source by cutting."""
    start, stop = sorted((one, other))
    file = folder_weights(str(pipeline_template), WAN.modules)["transformer"]
    names = ["patch_embedding.weight", "patch_embedding.bias"]
    memory = TensorWeights("w", file.read(names[1:]))
    drawn = InitialAdapters("r", "m", {"x.lora_A.default.weight": torch.Size((24, 3))}, seed=1)
    places = {"a": (file, names[0]), "b": (memory, names[1]), "c": (drawn, *drawn.shapes)}
    joined = JoinedWeights("w", places)
    assert joined.describe()["a"] == file.describe()[names[0]]
    full = joined.read("abc")
    assert list(full) == ["a", "b", "c"]
    assert full["c"].std() > 0
    for name, value in full.items():
        assert torch.equal(joined.read_rows(name, start, stop), value[start:stop])
