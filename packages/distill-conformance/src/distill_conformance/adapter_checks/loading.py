"""Plugin, plan, loading, saving and export of a family."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from attrs import evolve, fields
from distill_protocols import (
    CONTRACT_VERSION,
    DistillError,
    ExportRequest,
    FamilyPlugin,
    LoraSpec,
    ModelBundle,
    ModulePlan,
    RoleHandle,
    RoleOptions,
    RoleSpec,
    SamplerSpec,
    TensorWeights,
    WeightsError,
    WeightSource,
)
from torch import Tensor, nn

from distill_conformance.adapter_case import (
    ROWS,
    AdapterCase,
    LoadedModels,
    drop_gradients,
    modules_of,
)
from distill_conformance.failures import applies_if, must_raise, require, require_equal

SPEC = SamplerSpec(steps=2, timesteps=(1000.0, 600.0), stochastic=True)


def check_plugin(case: AdapterCase) -> None:
    """The plugin states its name, contract and options, and finds no problem in this case.

    Otherwise it is refused when a run file names it, or a valid run file is.
    """
    plugin, config = case.plugin, case.config
    require(isinstance(plugin, FamilyPlugin), f"{plugin!r} is no FamilyPlugin")
    require(bool(plugin.name and plugin.help), "a plugin states its name and a line of help")
    require(
        plugin.contract == CONTRACT_VERSION,
        f"the plugin was built for contract {plugin.contract}, and this is {CONTRACT_VERSION}",
    )
    require(
        isinstance(config, plugin.config_class),
        f"config is a {type(config).__name__}, and config_class is {plugin.config_class.__name__}",
    )
    known = {f.name for f in fields(RoleOptions)}
    unknown = sorted(set(plugin.role_options(config)) - known)
    require(not unknown, f"role_options names {unknown}, which are no fields of RoleOptions")
    problems = [
        *plugin.config_problems(config, [spec.name for spec in case.roles]),
        *(problem for spec in case.roles for problem in plugin.role_problems(spec, config)),
    ]
    require(not problems, f"the plugin refuses its own case: {problems}")


def check_plan_is_what_loads(case: AdapterCase) -> None:
    """``plan`` names the modules and tensors that ``load`` makes.

    The memory plan, checkpoints and the warm start of a run rely on it before anything is loaded.
    """
    for spec in case.roles:
        plan, handle = case.plugin.plan(spec, case.config), case.bundle[spec.name]
        planned = {module.name: module for module in plan.modules}
        require(
            planned.keys() == handle.modules.keys(),
            f"role {spec.name!r}: planned {sorted(planned)}, loaded {sorted(handle.modules)}",
        )
        for key, module in handle.modules.items():
            _require_planned(spec.name, handle, planned[key], module)


def _require_planned(role: str, handle: RoleHandle, plan: ModulePlan, module: nn.Module) -> None:
    trained = handle.trained_parameters(plan.name)
    loaded = {
        name: (tuple(p.shape), p.dtype, name in trained) for name, p in module.named_parameters()
    }
    planned = {t.name: (t.shape, t.dtype, t.trained) for t in plan.tensors}
    wrong = sorted(
        name for name in loaded.keys() | planned.keys() if loaded.get(name) != planned.get(name)
    )
    require(
        not wrong,
        f"role {role!r}, module {plan.name!r}: (shape, dtype, trained) of {wrong[:4]} are planned "
        f"{[planned.get(n) for n in wrong[:4]]} and loaded {[loaded.get(n) for n in wrong[:4]]}",
    )


def check_loading_is_deterministic(case: AdapterCase) -> None:
    """Two loads with one seed give the same weights.

    Otherwise ranks that each draw a LoRA or a discriminator start from different models.
    """
    first = _all_weights(case.load(case.roles, perturb=False).bundle)
    second = _all_weights(case.load(case.roles, perturb=False).bundle)
    require(first.keys() == second.keys(), "two loads give different tensors")
    for name, tensor in first.items():
        require_equal(second[name], tensor, f"{name} of two loads")


def check_weights_round_trip(case: AdapterCase) -> None:
    """A role loaded from ``RoleHandle.weight_sources`` gives the same outputs to the last bit.

    This is what a resumed checkpoint and a warm start do.
    """
    role = case.trained_role
    sources = dict(case.bundle[role.name].weight_sources())
    copy = case.load_with(role, weights=sources)
    require_equal(
        _output(case, copy, role.name),
        _output(case, case.loaded, role.name),
        "outputs of a role and of one loaded from its weights",
    )


def check_incomplete_weights(case: AdapterCase) -> None:
    """Weights that lack a tensor, or hold one too many, are refused with ``WeightsError``.

    Otherwise a part of the model silently stays as it was drawn.
    """
    role = case.trained_role
    for action in ("lack a tensor", "hold an unknown tensor"):
        sources: dict[str, WeightSource] = {}
        for key, source in case.bundle[role.name].weight_sources().items():
            tensors = dict(source.tensors)
            if action == "lack a tensor":
                del tensors[next(iter(tensors))]
            else:
                tensors["no.such.weight"] = torch.zeros(1)
            sources[key] = TensorWeights("conformance", tensors)
        with must_raise(WeightsError, f"loading weights that {action}"):
            case.load_with(role, weights=sources)


def check_path_weights(case: AdapterCase) -> None:
    """``weights(path)`` gives what ``load`` reads from there.

    Otherwise ``init_from`` starts a role from another model than the path states.
    """
    role = case.trained_role
    sources = dict(case.plugin.weights(role.path))
    plain = case.load_with(role, perturb=False)
    same = case.load_with(role, weights=sources, perturb=False)
    require_equal(
        _output(case, same, role.name),
        _output(case, plain, role.name),
        "outputs of a role and of one loaded from plugin.weights(path)",
    )


def check_activation_checkpointing(case: AdapterCase) -> None:
    """Activation checkpointing changes neither outputs nor gradients."""
    applies_if("activation_checkpointing" in _options(case), "the family does not honour it")
    role = case.trained_role
    option = evolve(role, activation_checkpointing=True)
    _require_no_problem(case, option)
    other, plain = case.load_with(option), case.load_with(role)
    outputs, gradients = [], []
    for models in (plain, other):
        output = _output(case, models, role.name, gradient=True)
        output.square().mean().backward()
        outputs.append(output.detach())
        found = [p.grad for m in modules_of(models.bundle).values() for p in m.parameters()]
        gradients.append([g for g in found if g is not None])
        drop_gradients(models.bundle)
    case.require_close(outputs[1], outputs[0], "outputs with activation checkpointing")
    require(len(gradients[0]) == len(gradients[1]), "checkpointing loses gradients")
    for ours, theirs in zip(*gradients, strict=True):
        case.require_close(theirs, ours, "gradients with activation checkpointing")


def check_offload(case: AdapterCase) -> None:
    """A frozen role that waits in host memory gives the same outputs."""
    applies_if("offload" in _options(case), "the family does not honour it")
    frozen = [s for s in case.roles if not s.trainable and s.heads is None]
    applies_if(bool(frozen), "no role of the case is frozen")
    role = frozen[0]
    option = evolve(role, offload=True)
    _require_no_problem(case, option)
    require_equal(
        _output(case, case.load_with(option), role.name),
        _output(case, case.load_with(role), role.name),
        "outputs with offload",
    )


def check_lora(case: AdapterCase) -> None:
    """A LoRA starts as the model beneath it, trains its adapters alone, and loads from them.

    Otherwise the first step changes the model, the base moves, or checkpoints hold nothing.
    """
    applies_if("lora" in _options(case), "the family does not honour it")
    role = case.trained_role
    spec = evolve(role, lora=LoraSpec(rank=2))
    _require_no_problem(case, spec)
    fresh = case.load_with(spec, perturb=False)
    base = case.load_with(role, perturb=False)
    case.require_close(
        _output(case, fresh, role.name), _output(case, base, role.name), "a LoRA at its start"
    )
    handle = fresh.bundle[role.name]
    require(
        all(handle.trained_parameters(key) for key in handle.modules), "a LoRA trains no parameter"
    )
    plans = {m.name: m for m in case.plugin.plan(spec, case.config).modules}
    for key, module in handle.modules.items():
        _require_planned(role.name, handle, plans[key], module)
        adapters = {tensor.name for tensor in plans[key].tensors if tensor.adapter}
        require(
            adapters == handle.trained_parameters(key).keys(),
            "the parameters of a LoRA role that train are not its adapters alone",
        )
    moved = case.load_with(spec)
    output = _output(case, moved, role.name, gradient=True)
    output.square().mean().backward()
    _require_gradients_of_adapters(moved.bundle[role.name])
    sources = dict(moved.bundle[role.name].weight_sources())
    require_equal(
        _output(case, case.load_with(spec, weights=sources), role.name),
        output.detach(),
        "outputs of a LoRA role and of one loaded from its adapters",
    )


def check_lora_beside_base(case: AdapterCase) -> None:
    """A LoRA beside the weights of a frozen role shares them, and leaves that role as it was.

    Otherwise memory holds the base twice, or the teacher learns with its student.
    """
    applies_if({"lora", "base"} <= _options(case), "the family does not honour it")
    applies_if(not case.causal_roles, "a causal role has another kind of model than its base")
    frozen = [s for s in case.roles if not s.trainable and s.heads is None]
    applies_if(bool(frozen), "no role of the case is frozen")
    base, role = frozen[0].name, case.trained_role.name
    alone = _output(case, case.load(frozen[:1]), base)
    spec = RoleSpec(
        name=role, path=frozen[0].path, trainable=True, base=base, lora=LoraSpec(rank=2)
    )
    models = case.load([frozen[0], spec])
    places = {p.data_ptr() for m in models.bundle[role].modules.values() for p in m.parameters()}
    for name, module in models.bundle[base].modules.items():
        own = {p.data_ptr() for p in module.parameters()}
        require(bool(own & places), f"module {name!r} of the base is held twice")
    output = _output(case, models, role, gradient=True)
    require(not torch.equal(output.detach(), alone), "adapters that moved have no effect")
    output.square().mean().backward()
    _require_gradients_of_adapters(models.bundle[role])
    require_equal(_output(case, models, base), alone, "the base beside a LoRA and alone")


def _require_gradients_of_adapters(handle: RoleHandle) -> None:
    for key, module in handle.modules.items():
        adapters = handle.trained_parameters(key)
        reached = {name for name, p in module.named_parameters() if p.grad is not None}
        frozen = sorted(reached - adapters.keys())
        require(not frozen, f"a loss reaches {frozen[:4]}, which are no adapters of the LoRA")


def check_exports(case: AdapterCase) -> None:
    """Each export format is written, verifies, and fails to verify against other weights.

    Otherwise a broken export is found out by whoever downloads it.
    """
    formats = case.plugin.export_formats()
    applies_if(bool(formats), "the family exports nothing")
    role = case.trained_role
    exporter = case.plugin.exporter(case.config, source=case.components)
    sources: Mapping[str, WeightSource] = dict(case.bundle[role.name].weight_sources())
    written = 0
    for name in formats:
        request = ExportRequest(sampler=SPEC, format=name)
        if list(case.plugin.export_problems(role, request)):
            continue
        with tempfile.TemporaryDirectory() as base:
            folder = Path(base) / "export"
            exporter.export(role, sources, folder, request)
            require(folder.exists(), f"format {name!r}: export writes nothing at {folder}")
            exporter.verify(role, sources, folder, request)
            with must_raise(WeightsError, f"verifying {name!r} against other weights"):
                exporter.verify(role, _others(sources), folder, request)
        written += 1
    require(written > 0, f"none of the formats {sorted(formats)} can be written for a plain role")


def _others(sources: Mapping[str, WeightSource]) -> dict[str, WeightSource]:
    return {
        key: TensorWeights(
            "other weights",
            {
                name: tensor + 0.5 if tensor.is_floating_point() else tensor
                for name, tensor in source.read(source.describe()).items()
            },
        )
        for key, source in sources.items()
    }


def check_unknown_path(case: AdapterCase) -> None:
    """A role whose folder does not exist is a problem of the file, and an error of the framework.

    Otherwise a spelling mistake ends in a stack trace of a model library.
    """
    role = evolve(case.roles[0], path="/nonexistent/conformance", heads=None)
    problems = list(case.plugin.role_problems(role, case.config))
    applies_if(bool(problems), "any path is a model of this family")
    with must_raise(DistillError, "loading a role from a folder that does not exist"):
        case.load_with(role)


def _options(case: AdapterCase) -> frozenset[str]:
    return frozenset(case.plugin.role_options(case.config))


def _require_no_problem(case: AdapterCase, role: RoleSpec) -> None:
    problems = list(case.plugin.role_problems(role, case.config))
    require(
        not problems,
        f"role_options has {role.options_set()}, but the plugin refuses it: {problems}",
    )


def _all_weights(bundle: ModelBundle) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": parameter.detach()
        for key, module in modules_of(bundle).items()
        for name, parameter in module.named_parameters()
    }


def _output(
    case: AdapterCase, models: LoadedModels, role: str, *, gradient: bool = False
) -> Tensor:
    """v of ``role`` at all ranges of its experts, joined."""
    with torch.set_grad_enabled(gradient):
        outputs = [
            models.adapter.forward(role, case.noise(), t, case.condition())
            for t in case.times(role)
        ]
    require(len(outputs[0]) == ROWS, f"a call with {ROWS} rows gives {len(outputs[0])}")
    return torch.cat(outputs)
