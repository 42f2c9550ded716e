"""Samplers whose shift depends on the number of tokens: resolved before anybody sees them."""

from __future__ import annotations

import pytest
from attrs import evolve
from distill_adapters_wan.capabilities import CAPABILITIES
from distill_adapters_wan.plugin import WanFamily
from distill_protocols import ConfigError, DynamicShift, SamplerSpec
from distill_runfile import read_config
from distill_runfile.draft import SamplerCompletion

RULE = {"base_tokens": 10, "max_tokens": 20, "base_mu": 0.5, "max_mu": 1.5}
TOKENS = 16


@pytest.fixture
def count_tokens(monkeypatch) -> list[str]:
    """Let the family count tokens; return the folders that it was asked for."""
    sources: list[str] = []

    def tokens(self: WanFamily, config: object, *, source: str) -> int:
        sources.append(source)
        return TOKENS

    monkeypatch.setattr(WanFamily, "latent_tokens", tokens, raising=False)
    return sources


def dynamic(values) -> SamplerSpec:
    """Write samplers with a rule into two sections; returns what they must become."""
    sampler = {"steps": 4, "shift": RULE}
    values["method_config"]["student_sampler"] = {**sampler, "stochastic": True}
    values["validation"] = {
        "prompts": ["x"],
        "views": {"teacher": {"role": "teacher", "sampler": sampler}},
    }
    return SamplerSpec(steps=4, shift=DynamicShift(**RULE)).resolved(TOKENS)


def test_every_sampler_of_a_file_is_resolved(values, write, count_tokens, tmp_path):
    expected = dynamic(values)
    config = read_config(write(values))
    assert config.method.student_sampler is not None
    assert config.method.student_sampler.timesteps == expected.timesteps
    assert config.validation is not None
    assert config.validation.views["teacher"].sampler == expected
    written = config.resolved["validation"]["views"]["teacher"]["sampler"]
    assert written["shift"] == 1.0
    assert tuple(written["timesteps"]) == expected.timesteps
    assert set(count_tokens) == {config.source}


def test_a_family_that_cannot_count_tokens_is_a_problem_of_the_shift(values, write, monkeypatch):
    monkeypatch.setattr(WanFamily, "latent_tokens", lambda *args, **keys: None, raising=False)
    dynamic(values)
    path = write(values)
    with pytest.raises(ConfigError) as excinfo:
        read_config(path)
    first, second = excinfo.value.problems
    assert "method_config.student_sampler: the shift depends on the number of tokens" in first
    assert "validation.views.teacher.sampler: the shift depends" in second
    assert "family 'wan' cannot count" in first


def test_a_wrong_family_gives_no_second_problem_for_the_shift(values, write):
    dynamic(values)
    values["pipeline_config"]["num_frames"] = 8
    with pytest.raises(ConfigError) as excinfo:
        read_config(write(values))
    (problem,) = excinfo.value.problems
    assert "pipeline_config.num_frames" in problem


def test_a_wrong_rule_is_a_problem_of_its_own(values, write, count_tokens):
    dynamic(values)
    values["method_config"]["student_sampler"]["shift"] = RULE | {"max_tokens": 5}
    with pytest.raises(ConfigError) as excinfo:
        read_config(write(values))
    (problem,) = excinfo.value.problems
    assert "method_config.student_sampler.shift.max_tokens: 5 must be above base_tokens" in problem


def test_a_solver_is_known_and_resolved(values, write, count_tokens):
    dynamic(values)
    values["validation"]["views"]["teacher"]["sampler"]["solver"] = "unipc"
    config = read_config(write(values))
    assert config.validation is not None
    assert config.validation.views["teacher"].sampler == SamplerSpec(
        steps=4, shift=DynamicShift(**RULE), solver="unipc"
    ).resolved(TOKENS)
    written = config.resolved["validation"]["views"]["teacher"]["sampler"]
    assert written["solver"] == "unipc"
    assert config.resolved["method_config"]["student_sampler"]["solver"] == "euler"


def test_a_solver_that_is_unknown_or_not_the_familys_is_a_problem(values, write, monkeypatch):
    views = {
        "typo": {"role": "teacher", "sampler": {"steps": 4, "solver": "unipcc"}},
        "mixed": {
            "role": "teacher",
            "sampler": {"steps": 4, "solver": "unipc", "stochastic": True},
        },
        "right": {"role": "teacher", "sampler": {"steps": 4, "solver": "unipc"}},
    }
    values["validation"] = {"prompts": ["x"], "views": views}
    values["method_config"]["student_sampler"] = {"steps": 4, "solver": "unipc"}
    path = write(values)

    def problems():
        with pytest.raises(ConfigError) as excinfo:
            read_config(path)
        return sorted(problem.split(": ", 1)[1] for problem in excinfo.value.problems)

    method, mixed, typo = problems()
    assert method.startswith("method_config.student_sampler: solver unipc makes each step")
    assert mixed.startswith("validation.views.mixed.sampler.solver: unipc follows the ODE")
    assert typo.startswith("validation.views.typo.sampler.solver: ")
    assert "euler" in typo
    eulers = evolve(CAPABILITIES, solvers={"euler"})
    monkeypatch.setattr(WanFamily, "capabilities", lambda self, config: eulers)
    refused = [p for p in problems() if "does not sample by solver unipc (it has euler)" in p]
    assert [p.split(": ")[0] for p in refused] == [
        "method_config.student_sampler",
        "validation.views.right.sampler",
    ]


def test_the_walk_goes_through_configs_mappings_and_lists():
    spec = SamplerSpec(steps=2, shift=DynamicShift(**RULE))
    walk = SamplerCompletion("wan", lambda: TOKENS)
    value = walk({"a": (spec, 3), "b": SamplerSpec(steps=1)})
    assert value == {"a": (spec.resolved(TOKENS), 3), "b": SamplerSpec(steps=1)}
