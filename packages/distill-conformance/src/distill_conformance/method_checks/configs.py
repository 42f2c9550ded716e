"""What a method's config declares."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from typing import Any

import attrs
from distill_protocols import (
    CONTRACT_VERSION,
    ONE_TENSOR,
    Capabilities,
    CapabilityError,
    ConditioningError,
    MethodConfig,
    MethodPlugin,
    ModelBundle,
    RoleError,
    RoleHandle,
)
from hypothesis import given
from hypothesis import strategies as st

from distill_conformance.adapter_checks.calls import FEW
from distill_conformance.failures import applies_if, must_raise, require
from distill_conformance.method_case import MethodCase
from distill_conformance.toy import ToyConditioning


def check_plugin(case: MethodCase) -> None:
    """The plugin states its name, contract, config class and where the method is.

    Otherwise it is refused when a run file names it.
    """
    plugin = case.plugin
    require(isinstance(plugin, MethodPlugin), f"{plugin!r} is no MethodPlugin")
    require(bool(plugin.name and plugin.help), "a plugin states its name and a line of help")
    require(
        plugin.contract == CONTRACT_VERSION,
        f"the plugin was built for contract {plugin.contract}, and this is {CONTRACT_VERSION}",
    )
    require(
        issubclass(plugin.config_class, MethodConfig)
        and isinstance(case.config, plugin.config_class),
        f"config is a {type(case.config).__name__}, and config_class {plugin.config_class}",
    )


def check_config_is_frozen(case: MethodCase) -> None:
    """A config is a frozen attrs class whose fields are given by name.

    A run plans by it, trains by it and writes it down; it must not change in between.
    """
    config: Any = case.config
    require(attrs.has(type(config)), f"{type(config).__name__} is no attrs class")
    names = [f.name for f in attrs.fields(type(config))]
    for name in names[:1]:
        with must_raise(attrs.exceptions.FrozenInstanceError, f"setting {name} of a config"):
            setattr(config, name, getattr(config, name))
    positional = [f.name for f in attrs.fields(type(config)) if f.init and not f.kw_only]
    require(not positional, f"fields {positional} can be given by place; use kw_only=True")


def check_config_needs_no_torch(case: MethodCase) -> None:
    """The module of the config imports no torch.

    Otherwise a wrong run file is answered after seconds instead of at once.
    """
    module = type(case.config).__module__
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    applies_if(found is not None, f"{module} cannot be imported by name")
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    applies_if("ModuleNotFoundError" not in result.stderr, f"{module} cannot be imported by name")
    require(result.returncode == 0, f"importing {module} imports torch. {result.stderr[-500:]}")


def check_roles_and_turns(case: MethodCase) -> None:
    """Every trained role has a turn, no frozen one has, and every iteration has a turn.

    A role without a turn never learns; an iteration without one costs a step and moves nothing.
    """
    needs = {need.name: need for need in case.config.roles}
    require(len(needs) == len(case.config.roles), f"a role is named twice: {case.config.roles}")
    had = set()
    for iteration in range(1, case.iterations + 1):
        turns = case.config.turns(iteration)
        require(bool(turns), f"iteration {iteration} is nobody's turn")
        require(len(set(turns)) == len(turns), f"iteration {iteration}: {turns} names one twice")
        wrong = [name for name in turns if name not in case.trained_roles]
        require(
            not wrong, f"iteration {iteration} is the turn of {wrong}, which are not trained roles"
        )
        require(turns == case.config.turns(iteration), "turns() differs between two calls")
        had |= set(turns)
    idle = sorted(case.trained_roles - had)
    require(not idle, f"{idle} have no turn in {case.iterations} iterations, and would not learn")
    for need in case.config.roles:
        unknown = [name for name in need.features_of if name not in needs]
        require(
            not need.features_of or len(unknown) < len(need.features_of),
            f"{need.name!r} reads features of {need.features_of}, none of which is a role",
        )


def check_capability_names(case: MethodCase) -> None:
    """All capabilities that the config asks for exist, and a family without one is refused.

    A method that asks for nothing fails in the middle of a step.
    """
    Capabilities().missing(case.config.capabilities)
    for name in case.config.capabilities:
        adapter, bundle = case.models(0)
        lacking = _without(adapter.capabilities, name)
        if not lacking.missing([name]):
            continue
        with must_raise(CapabilityError, f"building the method on a family without {name}"):
            case.build(models=(_Limited(adapter, lacking), bundle))  # type: ignore[arg-type]


def _without(capabilities: Capabilities, name: str) -> Capabilities:
    if name.startswith("pred:"):
        kinds = capabilities.supported_pred_types - {name.removeprefix("pred:")}
        return attrs.evolve(capabilities, supported_pred_types=kinds)
    if name.startswith("causal:"):
        roles = capabilities.causal_roles - {name.removeprefix("causal:")}
        return attrs.evolve(capabilities, causal_roles=roles)
    if name == ONE_TENSOR:
        return attrs.evolve(capabilities, supports_latent_parts=True)
    return attrs.evolve(capabilities, **{name: False})


class _Limited:
    """An adapter that states less than it can."""

    def __init__(self, adapter: object, capabilities: Capabilities) -> None:
        self._adapter = adapter
        self.capabilities = capabilities

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)


def check_missing_roles(case: MethodCase) -> None:
    """A missing role, a frozen one that is to be trained, and a trainable one that is not raise
    ``RoleError``.

    Otherwise a run trains nothing, or moves its own teacher.
    """
    for need in case.config.roles:
        adapter, bundle = case.models(0)
        del bundle.roles[need.name]
        with must_raise(RoleError, f"building the method without its role {need.name!r}"):
            case.build(models=(adapter, bundle))
        adapter, bundle = case.models(0)
        role = bundle.roles[need.name]
        bundle.roles[need.name] = RoleHandle(
            name=role.name,
            modules=role.modules,
            trainable=not need.trainable,
            discriminator=role.discriminator,
        )
        state = "frozen" if need.trainable else "trainable"
        with must_raise(RoleError, f"building the method with role {need.name!r} {state}"):
            case.build(models=(adapter, ModelBundle(bundle.roles)))


def check_needs_negative(case: MethodCase) -> None:
    """A guided method declares it, and is not built without a negative condition.

    Otherwise the run ends in its first guided call. One that does not declare it never asks for it.
    """
    without = ToyConditioning(has_negative=False)
    if case.config.needs_negative:
        with must_raise(ConditioningError, "building a guided method without a negative condition"):
            case.build(conditioning=without)
        return
    method = case.build(conditioning=without)
    for iteration in range(1, case.iterations + 1):
        method.single_train_step(case.batch(2, 0), iteration)


def check_update_share(case: MethodCase) -> None:
    """Shares of a role's updates over ranges that fill [0, 1000] sum to 1, each within [0, 1].

    With several losses in an iteration (``MethodCase.losses``) they sum to at most as many.
    Learning-rate schedules of experts are as long as their shares. A config without an answer
    states 1 for every range.
    """

    @FEW
    @given(inner=st.lists(st.floats(1, 999), max_size=3, unique=True))
    def check(inner: list[float]) -> None:
        ends = [0.0, *sorted(inner), 1000.0]
        for role in sorted(case.trained_roles):
            shares = [
                case.config.update_share(role, low, high) for low, high in itertools.pairwise(ends)
            ]
            require(
                all(-1e-6 <= share <= 1 + 1e-6 for share in shares),
                f"shares of {role!r} over {ends} are {shares}, beyond [0, 1]",
            )
            require(
                1 - 1e-3 < sum(shares) < case.losses + 1e-3 or all(s == 1 for s in shares),
                f"shares of {role!r} over {ends} are {shares}, which sum to {sum(shares)}; they "
                f"must sum to 1, or with {case.losses} losses to no more than that",
            )

    check()


def check_trajectory_times(case: MethodCase) -> None:
    """Levels of a trajectory fall, within (0, 1000]."""
    times = case.config.trajectory_times
    applies_if(bool(times), "the method reads no trajectories")
    require(
        all(0 < t <= 1000 for t in times) and list(times) == sorted(set(times), reverse=True),
        f"trajectory_times are {times}; they must fall and lie in (0, 1000]",
    )
