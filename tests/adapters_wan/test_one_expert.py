"""Roles with one of two experts (``RoleOptions.experts``): what they are, and what they train."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
import torch
from attrs import evolve, fields_dict, frozen
from distill_adapters_wan import PLUGIN, CausalConfig
from distill_methods import ConsistencyConfig
from distill_protocols import (
    ContractError,
    DiscriminatorSpec,
    ExportRequest,
    LoraSpec,
    ModelBundle,
    RandomStreams,
    RoleSpec,
    SamplerSpec,
    TensorWeights,
    WeightsError,
)
from distill_trainer import OptimizerConfig, build_optimizers
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import CASES, Conditioning, Setups, gradients, normal
from safetensors.torch import load_file, save_file
from wan_variants import VARIANTS

CPU = torch.device("cpu")
VARIANT = VARIANTS["t2v-experts"]
BOTH = VARIANT.modules


@frozen
class Side:
    """One side of the boundary, 875: an expert, times that are its own, and a sampler's."""

    expert: str
    t_min: float
    t_max: float
    levels: tuple[float, ...]

    def restrict(self, config: Any) -> dict[str, Any]:
        """Options that put all times on this side, as far as the config draws or states them."""
        options: dict[str, Any] = {"student_sampler": SAMPLERS[self.expert]}
        names = fields_dict(type(config))
        if "time" in names:
            options["time"] = evolve(config.time, t_min=self.t_min, t_max=self.t_max)
        if "score_t_min" in names:
            options |= {"score_t_min": self.t_min, "score_t_max": self.t_max}
        return options


HIGH = Side("transformer", 880.0, 990.0, (1000.0, 960.0, 920.0, 890.0))
LOW = Side("transformer_2", 10.0, 870.0, (860.0, 700.0, 400.0, 200.0))
SAMPLERS = {
    side.expert: SamplerSpec(steps=4, timesteps=side.levels, stochastic=True)
    for side in (HIGH, LOW)
}
SIDES = pytest.mark.parametrize("side", [HIGH, LOW], ids=["high", "low"])


def spec(path: str, name: str = "student", *experts: str, **options: Any) -> RoleSpec:
    return RoleSpec(name=name, path=path, experts=experts, **{"trainable": True, **options})


# -- what a role of one expert is -----------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2)], ids=["whole", "lora"])
@SIDES
def test_only_the_expert_is_loaded_and_planned(folder_of, side, lora):
    path = folder_of("t2v-experts")
    role = spec(path, "student", side.expert, lora=lora)
    handle = PLUGIN.load([role], VARIANT.config, device=CPU)["student"]
    both = PLUGIN.load([evolve(role, experts=())], VARIANT.config, device=CPU)["student"]
    assert list(handle.modules) == [side.expert]
    theirs = both.modules[side.expert].state_dict()
    assert all(
        torch.equal(v, theirs[k]) for k, v in handle.modules[side.expert].state_dict().items()
    )
    plan = PLUGIN.plan(role, VARIANT.config)
    assert [module.name for module in plan.modules] == [side.expert]
    counted = sum(p.numel() for p in handle.modules[side.expert].parameters())
    assert sum(m.parameters + m.adapters for m in plan.modules) == counted


@SIDES
def test_its_times_are_its_own_and_a_call_elsewhere_is_refused(folder_of, side):
    path = folder_of("t2v-experts")
    roles = [spec(path, "student", side.expert), spec(path, "teacher", trainable=False)]
    adapter = PLUGIN.adapter(
        PLUGIN.load(roles, VARIANT.config, device=CPU), VARIANT.config, source=path
    )
    low, high = (875.0, 1000.0) if side is HIGH else (0.0, 875.0)
    assert adapter.expert_ranges("student") == adapter.expert_ranges("student", "teacher")
    assert adapter.expert_ranges("student") == ((low, high),)
    assert PLUGIN.expert_ranges(roles[0], VARIANT.config) == {side.expert: (low, high)}
    assert adapter.expert_of("student", torch.tensor([low, high - 1])) == side.expert
    inside, other = (1000.0, 874.0) if side is HIGH else (0.0, 875.0)
    assert adapter.expert_of("student", torch.tensor([inside])) == side.expert
    with pytest.raises(ContractError, match=f"it has {side.expert} alone, for t from {low:g} to"):
        adapter.expert_of("student", torch.tensor([other]))
    with pytest.raises(ContractError, match="on both sides of 875"):
        adapter.expert_of("student", torch.tensor([inside, other]))


def test_two_roles_of_the_two_experts_have_no_time_in_common(folder_of):
    path = folder_of("t2v-experts")
    roles = [spec(path, "student", "transformer"), spec(path, "critic", "transformer_2")]
    bundle = PLUGIN.load(roles, VARIANT.config, device=CPU)
    adapter = PLUGIN.adapter(bundle, VARIANT.config, source=path)
    assert adapter.expert_ranges("student", "critic") == ()
    method = CASES["finetune"].method(
        bundle, adapter, CASES["finetune"].config, conditioning=Conditioning(6),
        streams=RandomStreams(0),
    )  # fmt: skip
    with pytest.raises(ContractError, match="student, critic can be called at t in"):
        method.noise.sample_timesteps("p", 2, 1, CASES["finetune"].config.time, "student", "critic")


@pytest.mark.parametrize(
    ("variant", "experts", "message"),
    [
        ("t2v-experts", ("low",), "low: no expert of .*, which has transformer for t from 875"),
        ("t2v", ("transformer",), "has one transformer, called at every t"),
    ],
    ids=["unknown", "single"],
)
def test_an_expert_that_the_model_has_not_is_refused(folder_of, variant, experts, message):
    role = spec(folder_of(variant), "student", *experts)
    problems = {p.path: p.message for p in PLUGIN.role_problems(role, VARIANTS[variant].config)}
    assert list(problems) == [("experts",)]
    with pytest.raises(AssertionError):
        assert problems["experts",] == ""
    assert re.search(message, problems["experts",])
    with pytest.raises(WeightsError, match="experts"):
        PLUGIN.load([role], VARIANTS[variant].config, device=CPU)


def test_the_other_experts_weights_need_not_be_there(folder_of, tmp_path):
    """So 28 GB of a 14B model need no disk, until an export is completed with them."""
    path = shutil.copytree(folder_of("t2v-experts"), tmp_path / "model")
    (path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    role = spec(str(path), "student", "transformer_2")
    assert list(PLUGIN.role_problems(role, VARIANT.config)) == []
    assert PLUGIN.plan(role, VARIANT.config).present
    PLUGIN.load([role], VARIANT.config, device=CPU)
    request = ExportRequest(sampler=SAMPLERS["transformer_2"])
    (problem,) = PLUGIN.export_problems(role, request)
    assert "must be completed with the weights of its path" in problem.message
    assert list(PLUGIN.export_problems(role, evolve(request, format="comfyui"))) == []
    assert list(PLUGIN.role_problems(evolve(role, experts=()), VARIANT.config))


# -- what it starts with --------------------------------------------------------------------------


def test_a_file_that_names_no_expert_is_that_of_a_role_with_one(folder_of, tmp_path):
    path, module = folder_of("t2v-experts"), "transformer_2"
    role = spec(path, "student", module)
    file = tmp_path / "low.safetensors"
    own = PLUGIN.weights(path)[module]
    moved = {name: t + 1 for name, t in own.read(own.describe()).items()}
    save_file(moved, file)
    assert list(PLUGIN.start_problems(role, VARIANT.config, str(file))) == []
    (start,) = PLUGIN.start_weights(role, str(file)).items()
    assert start[0] == module
    assert all(torch.equal(t, moved[n]) for n, t in start[1].read(start[1].describe()).items())
    # A folder, and a checkpoint, of both: its own part.
    assert list(PLUGIN.start_weights(role, path)) == [module]
    given = {key: TensorWeights(key, moved) for key in BOTH}
    loaded = PLUGIN.load([role], VARIANT.config, device=CPU, weights={"student": given})
    state = loaded["student"].modules[module].state_dict()
    assert all(torch.equal(state[name], value) for name, value in moved.items())
    with pytest.raises(WeightsError, match=r"weights are given for transformer of role 'student'"):
        PLUGIN.load(
            [role], VARIANT.config, device=CPU,
            weights={"student": {"transformer": given["transformer"]}},
        )  # fmt: skip


@pytest.mark.parametrize("experts", [(), ("transformer_2",)], ids=["both", "own"])
def test_a_lora_of_one_expert_beside_a_base_of_both(folder_of, experts):
    path = folder_of("t2v-experts")
    roles = [
        spec(path, "teacher", *experts, trainable=False),
        spec(path, "student", "transformer_2", base="teacher", lora=LoraSpec(rank=2)),
    ]
    bundle = PLUGIN.load(roles, VARIANT.config, device=CPU)
    student, teacher = (bundle[n].modules["transformer_2"] for n in ("student", "teacher"))
    name = "patch_embedding.weight"
    assert student.get_parameter(name).data_ptr() == teacher.get_parameter(name).data_ptr()
    assert list(bundle["student"].modules) == ["transformer_2"]


# -- exports --------------------------------------------------------------------------------------


def exported(folder_of, folder, side, *, lora=None, **request):
    """A role of one expert with weights of its own, exported and verified."""
    path = folder_of("t2v-experts")
    role = spec(path, "student", side.expert, lora=lora)
    handle = PLUGIN.load([role], VARIANT.config, device=CPU)["student"]
    for seed, parameter in enumerate(handle.trained_parameters(side.expert).values()):
        parameter.data.add_(normal(*parameter.shape, seed=seed), alpha=0.02)
    exporter = PLUGIN.exporter(VARIANT.config, source=path)
    asked = ExportRequest(sampler=SAMPLERS[side.expert], **request)
    record = exporter.export(role, handle.weight_sources(), folder, asked)
    assert exporter.verify(role, handle.weight_sources(), folder, asked)["notes"]
    return path, handle, record


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2)], ids=["whole", "lora"])
@SIDES
def test_a_pipeline_folder_is_completed_with_the_other_expert(folder_of, tmp_path, side, lora):
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    path, handle, record = exported(folder_of, tmp_path / "s", side, lora=lora)
    (other,) = set(BOTH) - {side.expert}
    # The folder's own name: others read the record on another machine.
    assert f"{other} is that of t2v-experts, unchanged" in " ".join(record["notes"])
    pipeline = WanPipeline.from_pretrained(tmp_path / "s")
    assert pipeline.config.boundary_ratio == 0.875
    file = "diffusion_pytorch_model.safetensors"
    for module, same in ((side.expert, False), (other, True)):
        old, new = (load_file(f"{f}/{module}/{file}") for f in (path, tmp_path / "s"))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[k], new[k]) for k in old) == same
    if lora is None:
        state = handle.modules[side.expert].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in load_file(
            tmp_path / "s" / side.expert / file).items())  # fmt: skip


@SIDES
def test_single_files_and_loras_are_of_the_expert_alone(folder_of, tmp_path, side):
    end = "" if side is HIGH else "-transformer_2"
    exported(folder_of, tmp_path / "c", side, format="comfyui")
    assert [f.name for f in (tmp_path / "c").glob("*.safetensors")] == [f"c{end}.safetensors"]
    for name, options in {"own": {"lora": LoraSpec(rank=2)}, "made": {"lora_rank": 2}}.items():
        exported(folder_of, tmp_path / name, side, format="lora", **options)
        assert sorted(f.name for f in (tmp_path / name).glob("*.safetensors")) == [
            f"{name}-comfyui{end}.safetensors",
            f"pytorch_lora_weights{end}.safetensors",
        ]
    # One expert after the other: the second starts from the first's folder, as its path.
    names = json.loads((tmp_path / "c" / "sampler_spec.json").read_text())["files"]
    assert list(names) == [f"c{end}.safetensors"]


# -- what it trains -------------------------------------------------------------------------------


class Worlds:
    """Adapter and bundle with a student and a critic of ``experts``; a teacher of both."""

    def __init__(self, folder_of) -> None:
        self.path = folder_of("t2v-experts")
        self.both = Setups(folder_of)
        self.made: dict[tuple[str, str], tuple[Any, ModelBundle]] = {}

    def __call__(self, expert: str, student: str) -> tuple[Any, ModelBundle]:
        key = (expert, student)
        if key not in self.made:
            config = VARIANT.config
            if student == "causal":
                config = evolve(config, causal=CausalConfig(roles=("student",), chunk_frames=1))
            heads = DiscriminatorSpec(on="teacher", blocks=(0, 1), width=8)
            roles = [
                spec(self.path, "student", expert),
                spec(self.path, "teacher", trainable=False),
                spec(self.path, "critic", expert),
                spec(self.path, "discriminator", heads=heads),
            ]
            bundle = PLUGIN.load(roles, config, device=CPU)
            _, both = self.both("t2v-experts", student)
            for role in bundle.roles.values():
                for name, module in role.modules.items():
                    module.load_state_dict(both[role.name].modules[name].state_dict())
            self.made[key] = PLUGIN.adapter(bundle, config, source=self.path), bundle
        return self.made[key]

    def method(self, case: str, expert: str, config: Any, seed: int) -> Any:
        adapter, bundle = self(expert, CASES[case].students[0])
        for role in bundle.roles.values():
            if role.trainable:
                build_optimizers(role, OptimizerConfig(lr=1e-4), horizon=50)
        return CASES[case].method(
            bundle, adapter, config, conditioning=Conditioning(6), streams=RandomStreams(seed)
        )


@pytest.fixture(scope="module")
def worlds(folder_of):
    return Worlds(folder_of)


def stepped(method, batch, iteration):
    result = method.single_train_step(batch, iteration)
    result.loss_map["total_loss"].backward()
    found = {k: v.detach() for k, v in result.loss_map.items()}, gradients(method)
    method.optimizers_zero_grad(iteration)
    return found


EQUAL = [
    (case, side)
    for case, row in CASES.items()
    for side in (HIGH, LOW)
    # A phased student has both experts; a causal teacher is none of these worlds'.
    if row.experts and not case.startswith(("consistency", "rcm", "phased", "causal_consistency"))
    and not (side is HIGH and case.startswith(("self_forcing", "streaming")))
    and not (side is LOW and case == "dmd2 anchor")  # an anchor begins at noise
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "side"), [pytest.param(c, s, id=f"{c}-{s.expert}") for c, s in EQUAL]
)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**31), iteration=st.sampled_from([1, 2]))
def test_its_losses_and_gradients_are_those_of_two_experts_at_its_times(
    worlds, case, side, seed, iteration
):
    """Bit for bit, by a teacher of both."""
    config, batch = CASES[case].config, worlds.both.batch("t2v-experts", 2)
    options, student = side.restrict(config), CASES[case].students[0]
    two = worlds.both.build(case, "t2v-experts", student, seed=seed, **options)
    one = worlds.method(case, side.expert, evolve(config, **options), seed)
    (losses, gradient), (wanted, wanted_gradient) = (
        stepped(method, batch, iteration) for method in (one, two)
    )
    assert losses.keys() == wanted.keys()
    assert all(torch.equal(losses[k], wanted[k]) for k in wanted)
    assert gradient.keys() == wanted_gradient.keys()
    assert all(torch.equal(gradient[k], wanted_gradient[k]) for k in gradient)


@settings(max_examples=3)
@given(seed=st.integers(0, 2**31))
def test_consistency_of_the_low_noise_expert_is_that_of_two_where_they_draw_it(worlds, seed):
    config, batch = CASES["consistency"].config, worlds.both.batch("t2v-experts", 2)
    one = worlds.method("consistency", "transformer_2", config, seed)
    two = worlds.both.build("consistency", "t2v-experts", "bidirectional", seed=seed)
    for iteration in range(1, 9):
        (losses, gradient), (wanted, wanted_gradient) = (
            stepped(method, batch, iteration) for method in (one, two)
        )
        assert gradient.keys() == {"student.transformer_2"}
        if wanted_gradient.keys() == gradient.keys():
            break
    else:
        return
    # Streams of earlier iterations differ in how many numbers they took, and not in their count.
    assert torch.equal(losses["total_loss"], wanted["total_loss"])


@pytest.mark.parametrize("case", ["consistency", "consistency, continuous"])
def test_consistency_has_no_end_without_the_low_noise_expert(worlds, case):
    with pytest.raises(ContractError, match="only the other one reaches"):
        worlds.method(case, "transformer", CASES[case].config, 0)


def test_continuous_consistency_trains_the_low_noise_expert(worlds):
    """Two experts it refuses; the one that ends at data it takes."""
    case = "consistency, continuous"
    method = worlds.method(case, "transformer_2", CASES[case].config, 0)
    losses, gradient = stepped(method, worlds.both.batch("t2v-experts", 2), 1)
    assert losses["total_loss"].isfinite()
    assert gradient.keys() == {"student.transformer_2"}
    assert isinstance(CASES[case].config, ConsistencyConfig)
