"""Several processes load one model: bit for bit that of one process, each reading what it holds."""

from __future__ import annotations

import json

import pytest
import wan_ranks as wan
from ranks import run_on_ranks
from wan_ranks import hsdp_copies, hsdp_parts, no_sharding, shard, shard_on_cpu, spec, trio

WAYS = [no_sharding, shard, shard_on_cpu, hsdp_parts]


def assert_no_error(results):
    """Return the results of all ranks, none of which failed."""
    assert not any(isinstance(result, str) for result in results), results
    return results


def test_every_way_of_sharding_gives_the_numbers_of_one_process(pipeline_template):
    """Of 24, 32 and 1 rows three processes hold uneven parts, and some nothing."""
    roles = [
        *trio(pipeline_template, precision="bf16"),
        spec(pipeline_template, "refiner", trainable=True),
    ]
    (expected,) = wan.outputs_of_ways(pipeline_template, roles)
    for rank in assert_no_error(
        run_on_ranks(wan.outputs_of_ways, pipeline_template, roles, WAYS, size=3)
    ):
        for way, (outputs, weights) in zip(WAYS, rank, strict=True):
            assert weights == expected[1], way
            assert outputs == expected[0], way


def test_the_derivative_of_a_sharded_role_is_that_of_a_whole_one(pipeline_template):
    for rank in assert_no_error(
        run_on_ranks(wan.tangents, str(pipeline_template), [no_sharding, shard])
    ):
        assert rank[0] == rank[1]


def test_each_rank_reads_what_it_holds(pipeline_template):
    roles = [spec(pipeline_template)]
    for read, local in assert_no_error(
        run_on_ranks(wan.read_by_each, pipeline_template, roles, shard)
    ):
        assert read == {name: count for name, count in local.items() if count}
    first, second = assert_no_error(
        run_on_ranks(wan.read_by_each, pipeline_template, roles, no_sharding)
    )
    assert first[0] == first[1] == second[1]
    assert second[0] == {}
    for read, local in assert_no_error(
        run_on_ranks(wan.read_by_each, pipeline_template, roles, hsdp_copies)
    ):
        assert read == local


def test_a_loading_error_on_one_rank_is_raised_on_all(pipeline_template, pipeline):
    file = pipeline / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "eps": 1e-5}))
    messages = assert_no_error(run_on_ranks(wan.loading_error, pipeline_template, pipeline))
    for rank in messages:
        assert "rank 0: " in rank["rank 0 cannot read"]
        assert "Input/output error" in rank["rank 0 cannot read"]
        assert rank["rank 1 need not read"] == "loaded"
        assert "Input/output error" in rank["rank 1 cannot read its part"]
        assert "another model for rank 1 than for rank 0" in rank["rank 1 has another model"]


@pytest.mark.parametrize("way", [no_sharding, shard])
def test_adapters_beside_one_base_train(pipeline_template, way):
    (expected,) = [wan.train_beside_base(pipeline_template, no_sharding)]
    results = assert_no_error(run_on_ranks(wan.train_beside_base, pipeline_template, way))
    for actual in [expected, *results]:
        for role, names in actual["gradients"].items():
            assert names
            assert all(n.startswith(f"{role}.") and ".lora_" in n for n in names)
        assert all("lora_" in name for name in actual["moved"])
        assert {name.split(".")[0] for name in actual["moved"]} == {"student", "critic"}
        assert actual["outputs"]["student"] != actual["outputs"]["teacher"]
    for role, names in expected["shared"].items():
        assert all(names.values()), role
    for actual in results:
        for names in actual["shared"].values():
            # Of uneven parts FSDP2 keeps a padded copy: here of one row on two ranks.
            assert {n for n, same in names.items() if not same} <= {
                n for n in names if n.endswith("scale_shift_table")
            }
        assert actual["moved"] == expected["moved"]
        assert actual["outputs"]["teacher"] == expected["outputs"]["teacher"]
