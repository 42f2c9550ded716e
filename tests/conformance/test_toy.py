"""The toy family that methods are tested on passes the suite of families itself."""

from __future__ import annotations

import pytest
from distill_conformance import AdapterCase, AdapterSuite
from distill_conformance.toy import ToyConfig, ToyFamily


@pytest.fixture(scope="module", params=[(), ("student",)], ids=["bidirectional", "causal"])
def case(request) -> AdapterCase:
    config = ToyConfig(causal_roles=request.param)
    return AdapterCase(plugin=ToyFamily(), config=config, source="toy")


class TestToyFamily(AdapterSuite):
    pass
