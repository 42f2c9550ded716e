"""Every family by every method: trained, resumed, validated, exported, sampled by stock code.

``make families`` runs all cells and writes docs/reference/families.md from their results.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from distill_protocols import ConfigError
from family_cases import FAMILIES, METHODS, QUICK, PreparedFamily, check_cell, train
from family_fixtures import installed, sd3

__all__ = ["installed", "sd3"]

CELLS = [
    pytest.param(
        family, method, id=f"{family}-{method}",
        marks=() if (family, method) in QUICK else pytest.mark.slow,  # 126 cells of 5 s each
    )
    for family in FAMILIES for method in METHODS
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(request, tmp_path_factory):
    """Return a family's case, prepared at first use."""
    made = {}

    def prepare(name: str) -> PreparedFamily:
        if name not in made:
            if FAMILIES[name].fixture:
                request.getfixturevalue(FAMILIES[name].fixture)
            made[name] = PreparedFamily(FAMILIES[name], tmp_path_factory.mktemp("family"))
        return made[name]

    return prepare


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_family_by_a_method(prepared, family, method, tmp_path, record_property):
    """What the family cannot do is refused by capability, before anything is built."""
    record_property("family", family)
    record_property("method", method)
    case = prepared(family)
    for name, value in case.features().items():
        record_property(f"feature {name}", value)
    try:
        outcome = check_cell(case, method, tmp_path)
    except ConfigError as error:
        (problem,) = error.problems
        outcome = f"refused: {problem.partition(': ')[2]}"
        assert problem.partition(": ")[2].startswith("recipe.method: "), problem
        assert not (tmp_path / "out").exists()
    record_property("outcome", outcome)


def test_a_shift_that_is_a_rule_reaches_the_stock_pipeline(prepared, tmp_path):
    """mu is linear in the tokens of a clip, the shift e^mu, and the last level is stretched."""
    ltx = prepared("LTX-Video")
    rule = {"base_tokens": 10, "base_mu": 0.5, "max_tokens": 30, "max_mu": 1.5, "terminal": 0.1}
    run = train(ltx.write(tmp_path, "finetune", steps=1, shift=rule))
    shift = math.exp(0.5 + (18 - 10) / (30 - 10) * (1.5 - 0.5))  # of 3 x 2 x 3 tokens
    free = [1 - shift * u / (1 + (shift - 1) * u) for u in (1, 0.75, 0.5, 0.25)]
    levels = [1000 * (1 - x * (1 - 0.1) / free[-1]) for x in free]
    record = json.loads((tmp_path / "out" / "student" / "sampler_spec.json").read_text())
    assert record["timesteps"] == pytest.approx(levels, abs=1e-3)
    assert record["stock_timesteps"] == pytest.approx(levels, abs=1e-3)
    theirs, at_levels, at_spec = ltx.sample_exported(run, tmp_path / "out" / "student")
    assert torch.equal(theirs, at_levels)
    torch.testing.assert_close(theirs, at_spec, rtol=0, atol=1e-5)
