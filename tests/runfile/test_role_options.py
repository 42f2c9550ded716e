"""Options of roles: one class has them all, and only a family that honours one is given it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import attrs
import distill_runfile.draft
import pytest
from distill_adapters_wan.plugin import WanFamily
from distill_protocols import ConfigError, RoleOptions, RolePlan, RoleSpec
from distill_runfile import RoleConfig, describe, read_config
from distill_runfile.roles import OPTIONS


class Family(WanFamily):
    """Wan that honours another option, and notes the roles that it is given."""

    def __init__(self) -> None:
        self.planned: list[RoleSpec] = []

    def role_options(self, config: Any) -> frozenset[str]:
        return super().role_options(config) | {"attention_backend"}

    def attention_backends(self, role: RoleSpec, config: Any) -> Collection[str]:
        return ("native", "flash")

    def attention_problem(self, role: RoleSpec, config: Any) -> None:
        """Whether the kernel can run depends on the machine."""

    def plan(self, role: RoleSpec, config: Any) -> RolePlan:
        self.planned.append(role)
        return super().plan(role, config)


@pytest.fixture
def family(monkeypatch) -> Family:
    """It is found instead of Wan."""
    family, real = Family(), distill_runfile.draft.load_plugin

    def load(group: Any, name: str) -> Any:
        return family if name == "wan" else real(group, name)

    monkeypatch.setattr(distill_runfile.draft, "load_plugin", load)
    return family


def test_the_run_file_and_the_spec_have_the_same_options():
    for cls in (RoleConfig, RoleSpec):
        assert set(OPTIONS) <= {f.name for f in attrs.fields(cls)}
    own = {f.name for f in attrs.fields(RoleConfig)} - {f.name for f in attrs.fields(RoleOptions)}
    assert own == {"path", "family", "trainable", "init_from", "optimizer"}


def test_an_option_reaches_the_family_the_plan_and_the_record(values, write, family):
    """No line of this package names it but the rule that its value is one of the family's."""
    values["models"]["student"]["attention_backend"] = "flash"
    config = read_config(write(values))
    assert config.roles["student"].spec.attention_backend == "flash"
    assert config.resolved["models"]["student"]["attention_backend"] == "flash"
    assert config.resolved["models"]["teacher"]["attention_backend"] is None
    assert "  student: attention_backend: flash" in describe(config).splitlines()
    # Roles that differ in it are planned by themselves.
    assert {spec.attention_backend for spec in family.planned} == {"flash", None}


def test_a_value_that_the_family_does_not_have(values, write, family):
    values["models"]["student"]["attention_backend"] = "flesh"
    with pytest.raises(ConfigError) as excinfo:
        read_config(write(values))
    (problem,) = excinfo.value.problems
    assert "models.student.attention_backend: 'flesh' is none that family 'wan' has" in problem
    assert "(native, flash)" in problem


def test_an_option_that_the_family_does_not_honour(values, write, monkeypatch, family):
    monkeypatch.setattr(Family, "role_options", lambda self, config: frozenset({"lora"}))
    values["models"]["teacher"] |= {"offload": True, "compile": {}}
    values["models"]["student"] |= {"activation_checkpointing": True, "precision": "bf16"}
    path = write(values)
    with pytest.raises(ConfigError) as excinfo:
        read_config(path)
    keys = ["student.activation_checkpointing", "teacher.compile", "teacher.offload"]
    problems = sorted(excinfo.value.problems, key=lambda problem: problem.split(": ")[1])
    assert [problem.split(": ")[1] for problem in problems] == [f"models.{key}" for key in keys]
    for problem, key in zip(problems, keys, strict=True):
        assert "does not honour this option" in problem
        line = path.read_text().splitlines()[int(problem.split(":")[1]) - 1]
        assert line.strip().startswith(key.split(".")[1])


def test_nothing_is_suggested_that_the_family_does_not_honour(values, write, monkeypatch, family):
    monkeypatch.setattr(Family, "role_options", lambda self, config: frozenset({"fsdp"}))
    text = describe(read_config(write(values), world_size=4), world_size=4, device_memory=10**6)
    helpful = text[text.index("what would help") :]
    assert "models.teacher.fsdp.shard" in helpful
    for option in ("offload", "activation_checkpointing", "lora"):
        assert option not in helpful.replace("fsdp.cpu_offload", "")


def test_a_family_that_cannot_estimate_a_call(values, write, monkeypatch, family):
    monkeypatch.setattr(Family, "plan_call", lambda self, *args, **keys: None)
    text = describe(read_config(write(values)), device_memory=80 * 10**9)
    assert "  weights fit, 80" in text
    assert "activations unknown: family 'wan' cannot estimate them for student" in text
    assert "  fits:" not in text


def test_the_kernel_of_the_run_is_that_of_roles_without_their_own(values, write):
    values["training"]["attention_backend"] = "_native_math"
    values["models"]["teacher"]["attention_backend"] = "native"
    config = read_config(write(values))
    kernels = {name: role.spec.attention_backend for name, role in config.roles.items()}
    assert kernels == {"student": "_native_math", "teacher": "native", "critic": "_native_math"}
    assert config.resolved["models"]["critic"]["attention_backend"] == "_native_math"
    assert "  critic: attention_backend: _native_math" in describe(config).splitlines()


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("fast", ["no attention backend 'fast'", "(for student, critic, which name none them"]),
        ("flash3", ["'flash3' needs the package flash_attn_interface, which is not installed"]),
    ],
)
def test_a_kernel_of_the_run_that_is_not_there_is_one_problem(values, write, kernel, words):
    values["training"]["attention_backend"] = kernel
    values["models"]["teacher"]["attention_backend"] = "native"
    with pytest.raises(ConfigError) as excinfo:
        read_config(write(values))
    (problem,) = excinfo.value.problems
    assert all(word in problem for word in ["training.attention_backend: ", *words]), problem


def test_a_kernel_of_the_run_for_a_family_that_has_none(values, write, monkeypatch, family):
    monkeypatch.setattr(Family, "role_options", lambda self, config: frozenset({"lora"}))
    monkeypatch.setattr(Family, "attention_backends", lambda self, role, config: ())
    values["training"]["attention_backend"] = "native"
    with pytest.raises(ConfigError) as excinfo:
        read_config(write(values))
    (problem,) = excinfo.value.problems
    assert "training.attention_backend: 'native' is none that family 'wan' has" in problem
