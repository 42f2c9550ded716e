"""The processes that torchrun started: how they find each other, and have one run file."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from hashlib import blake2b
from typing import Any
from uuid import uuid4

import torch
from attrs import frozen
from distill_protocols import RankError
from distill_runtime import Ranks
from torch import distributed

_BACKENDS = {"cpu": "gloo", "cuda": "cuda:nccl,cpu:gloo"}
"""gloo beside nccl takes tensors in host memory: weights that are offloaded, and their norms."""

_POLL_SECONDS = 0.02
"""Between two times that the first process asks the store for the others."""

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@frozen(kw_only=True)
class Launch:
    """This process among those that were started together.

    Attributes:
        rank, size: over all machines.
        local_rank, local_size: on this machine.
        address: ``host:port`` of the store through which they find each other; empty for a process
            alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read what torchrun has set; without it, this is a process alone.

        Raises:
            RankError: some of the variables are set and others not, or one is no number.
        """
        if "WORLD_SIZE" not in environment and "RANK" not in environment:
            return cls()
        missing = [name for name in _VARIABLES if name not in environment]
        wrong = [
            f"{name}={environment[name]!r}"
            for name in _VARIABLES
            if name in environment and name != "MASTER_ADDR" and not environment[name].isdecimal()
        ]
        if missing or wrong:
            raise RankError(
                f"{', '.join([*(f'{name} is not set' for name in missing), *wrong])}: processes "
                "of one run find each other by whole numbers in these environment variables. "
                "Start them with torchrun, which sets them all, or unset RANK and WORLD_SIZE for "
                "one process."
            )
        rank, size, local_rank, local_size = (int(environment[name]) for name in _VARIABLES[:4])
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            address=f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
        )

    def device(self, device_type: str) -> torch.device:
        """Return the device of this process.

        Raises:
            RankError: this machine has fewer devices than processes.
        """
        if device_type == "cpu":
            return torch.device("cpu")
        count = torch.accelerator.device_count()
        if self.local_rank >= count:
            raise RankError(
                f"process {self.local_rank} of this machine has no {device_type} device: there "
                f"are {count}, and each process needs one of its own (they count from 0). Start "
                f"{max(count, 1)} a machine (torchrun --nproc-per-node {max(count, 1)})."
            )
        return torch.device(device_type, self.local_rank)


@contextlib.contextmanager
def process_group(launch: Launch, device: torch.device, timeout: float) -> Iterator[None]:
    """Initialise torch.distributed with all processes of ``launch``, and destroy it at the end.

    A process group that exists already is used and left as it is.

    Args:
        timeout: seconds after which a process that does not answer is given up.

    Raises:
        RankError: they do not find each other.
    """
    if distributed.is_initialized():
        yield
        return
    if device.type not in _BACKENDS:
        raise RankError(
            f"{device.type} devices have no backend to reach other processes (only "
            f"{', '.join(_BACKENDS)} have one). Use one process and the strategy none."
        )
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    try:
        distributed.init_process_group(
            _BACKENDS[device.type],
            store=_open_store(launch, timeout),
            rank=launch.rank,
            world_size=launch.size,
            timeout=timedelta(seconds=timeout),
            device_id=None if device.type == "cpu" else device,
        )
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {launch.rank} of {launch.size} did not reach the others at {launch.address} "
            f"within {timeout:g} s ({str(error).splitlines()[0]}). All processes must connect to "
            "it. Check that each was started and reaches that address, then start all again."
        ) from error
    try:
        yield
    except BaseException:
        # abort before destroy: a collective under way may wait for a process that died, and
        # destroy_process_group would wait for that collective.
        group = distributed.group.WORLD
        if group is not None:
            group.abort()
        raise
    finally:
        distributed.destroy_process_group()


def _open_store(launch: Launch, timeout: float) -> distributed.Store:
    """Open a store that only these processes use.

    torchrun keeps one store over its restarts (``--max-restarts``), and torch names its keys alike
    each time: started again, processes would connect to the addresses of those that died, and hang
    (pytorch issue 135712; the count of restarts is no remedy, as each machine has its own). So
    they agree on a prefix for this start.
    """
    if launch.size == 1:
        # It may have been started without torchrun, so there may be no store to connect to.
        return distributed.HashStore()
    limit = timedelta(seconds=timeout)
    store, *_ = next(distributed.rendezvous("env://", launch.rank, launch.size, timeout=limit))
    store.set_timeout(limit)
    return distributed.PrefixStore(_agree_on_prefix(launch, store, timeout), store)


def _agree_on_prefix(launch: Launch, store: distributed.Store, timeout: float) -> str:
    """Let all processes of this start use the random name that process 0 draws.

    Each other process publishes a random id, process 0 answers to that id, and the process
    confirms. What a former start left in the store is answered too, but nobody of this start reads
    an answer to an id that is not its own.
    """
    own = uuid4().hex
    if launch.rank:
        store.set(f"distill/request/{launch.rank}", own)
        prefix = store.get(f"distill/answer/{own}").decode()
        store.set(f"distill/confirmed/{prefix}/{launch.rank}", "")
        return prefix
    missing = set(range(1, launch.size))
    answered: set[str] = set()
    deadline = time.monotonic() + timeout
    while missing:
        for rank in tuple(missing):
            request = f"distill/request/{rank}"
            if store.check([f"distill/confirmed/{own}/{rank}"]):
                missing.discard(rank)
            elif (
                store.check([request])
                and (requester := store.get(request).decode()) not in answered
            ):
                store.set(f"distill/answer/{requester}", own)
                answered.add(requester)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"no word of rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(_POLL_SECONDS)
    return own


def check_same_run(ranks: Ranks, resolved: Mapping[str, object]) -> None:
    """Refuse ranks that were started with different run files.

    Every rank calls it with its run file as resolved (JSON-able), before anything is built.

    Raises:
        RankError: they are not the same: on all ranks, which differ from rank 0 and where.
    """
    text = json.dumps(resolved, sort_keys=True)
    # Compare hashes first: whole run files are sent only where there is something to report.
    if not ranks.ranks_that_differ(blake2b(text.encode()).hexdigest()):
        return
    runs = [dict(_leaves(run)) for run in ranks.gather_results(lambda: resolved)]
    differences = []
    for rank, run in enumerate(runs):
        keys = [key for key in runs[0] | run if runs[0].get(key) != run.get(key)]
        if keys:
            some = ", ".join(
                f"{key}: {_describe(run, key)} (rank 0: {_describe(runs[0], key)})"
                for key in keys[:5]
            )
            more = f" and {len(keys) - 5} more keys" if len(keys) > 5 else ""
            differences.append(f"rank {rank} differs from rank 0 in {some}{more}")
    raise RankError(
        f"{'; '.join(differences)}. All ranks must have the same run, because each holds a part of "
        "it. Start all ranks with the same run file and the same overrides."
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _describe(run: Mapping[str, object], key: str) -> str:
    return repr(run[key]) if key in run else "absent"
