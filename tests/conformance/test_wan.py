"""Every kind of Wan passes the suite of families, in both ways that a student can see a clip."""

from __future__ import annotations

import pytest
import wan_variants
from attrs import evolve
from distill_adapters_wan import CausalConfig
from distill_conformance import AdapterCase, AdapterSuite
from distill_runtime import load_plugin

KINDS = ["t2v", "t2v-experts", "i2v-2.1", "ti2v"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return wan_variants.template(tmp_path_factory.mktemp("wan") / "pipeline")


class WanSuite(AdapterSuite):
    """The kinds differ in their transformers and in what a condition holds."""

    causal: tuple[str, ...] = ()

    @pytest.fixture(scope="class", params=KINDS)
    def case(self, request, template, tmp_path_factory) -> AdapterCase:
        folder = tmp_path_factory.mktemp("wan") / request.param
        wan_variants.build(request.param, template, folder)
        plugin = load_plugin("distill.families", "wan")
        config = wan_variants.VARIANTS[request.param].config
        if self.causal:
            config = evolve(config, causal=CausalConfig(roles=self.causal, chunk_frames=1))
        return AdapterCase(
            plugin=plugin, config=config, source=folder,
            prompts=("a seven moving", "moving left a a"), negative_prompt="left",
        )  # fmt: skip


class TestBidirectional(WanSuite):
    pass


class TestCausal(WanSuite):
    causal = ("student",)
