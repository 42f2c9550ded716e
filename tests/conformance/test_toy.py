"""The toy family that methods are tested on passes the suite of families itself."""

from __future__ import annotations

import pytest
from distill_conformance import AdapterCase, AdapterSuite
from distill_conformance.toy import ToyConfig, ToyFamily


class TestToyFamily(AdapterSuite):
    @pytest.fixture(scope="class", params=[(), ("student",)], ids=["bidirectional", "causal"])
    def case(self, request: pytest.FixtureRequest) -> AdapterCase:
        config = ToyConfig(causal_roles=request.param)
        return AdapterCase(plugin=ToyFamily(), config=config, source="toy")
