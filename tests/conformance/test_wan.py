"""Every kind of Wan passes the suite of families, with causal students and without."""

from __future__ import annotations

import itertools

import pytest
import wan_variants
from attrs import evolve
from distill_adapters_wan import CausalConfig
from distill_conformance import AdapterCase, AdapterSuite
from distill_runtime import load_plugin
from slow_cases import slow_but

KINDS = ["t2v", "t2v-experts", "i2v-2.1", "ti2v"]
STUDENTS = ["bidirectional", "causal"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return wan_variants.template(tmp_path_factory.mktemp("wan") / "pipeline")


DEFAULT = ("t2v-causal", "t2v-experts-bidirectional", "i2v-2.1-causal", "ti2v-bidirectional")
CASES = [f"{kind}-{student}" for kind, student in itertools.product(KINDS, STUDENTS)]


@pytest.fixture(scope="module", params=slow_but(DEFAULT, CASES))
def case(request, template, tmp_path_factory) -> AdapterCase:
    kind, _, student = request.param.rpartition("-")
    folder = tmp_path_factory.mktemp("wan") / kind
    wan_variants.build(kind, template, folder)
    config = wan_variants.VARIANTS[kind].config
    if student == "causal":
        config = evolve(config, causal=CausalConfig(roles=("student",), chunk_frames=1))
    return AdapterCase(
        plugin=load_plugin("distill.families", "wan"),
        config=config,
        source=folder,
        prompts=("a seven moving", "moving left a a"),
        negative_prompt="left",
    )


class TestWan(AdapterSuite):
    pass
