"""The processes that torchrun started, and how they find each other."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from uuid import uuid4

import torch
from attrs import frozen
from distill_protocols import RankError
from torch import distributed

_BACKENDS = {"cpu": "gloo", "cuda": "cuda:nccl,cpu:gloo"}
"""gloo beside nccl takes tensors in host memory: weights that are offloaded, and their norms."""

_LOOK_SECONDS = 0.02
"""Between two looks of the first process for the others."""

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@frozen(kw_only=True)
class Launch:
    """This process among those that were started together.

    Attributes:
        rank, size: over all machines.
        local_rank, local_size: on this machine.
        address: where they meet; empty for a process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """What torchrun said; without it, a process alone.

        Raises:
            RankError: it is half said.
        """
        if "WORLD_SIZE" not in environment and "RANK" not in environment:
            return cls()
        missing = [name for name in _NEEDED if name not in environment]
        wrong = [
            f"{name}={environment[name]!r}"
            for name in _NEEDED
            if name in environment and name != "MASTER_ADDR" and not environment[name].isdecimal()
        ]
        if missing or wrong:
            raise RankError(
                f"{', '.join([*(f'{name} is not set' for name in missing), *wrong])}: processes "
                "of one run find each other by whole numbers in these environment variables. "
                "Start them with torchrun, which sets them all, or unset RANK and WORLD_SIZE for "
                "one process."
            )
        rank, size, local_rank, local_size = (int(environment[name]) for name in _NEEDED[:4])
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            address=f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
        )

    def device(self, device_type: str) -> torch.device:
        """This process's own.

        Raises:
            RankError: this machine has fewer.
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
    """Within: torch.distributed has all processes of ``launch``; one that is there is left alone.

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
            f"{device.type} devices have no way to reach other processes here (there is one for "
            f"{', '.join(_BACKENDS)}). Use one process and strategy: none."
        )
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    try:
        distributed.init_process_group(
            _BACKENDS[device.type],
            store=_meeting_place(launch, timeout),
            rank=launch.rank,
            world_size=launch.size,
            timeout=timedelta(seconds=timeout),
            device_id=None if device.type == "cpu" else device,
        )
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {launch.rank} of {launch.size} did not meet the others at {launch.address} "
            f"within {timeout:g} s ({str(error).splitlines()[0]}). All processes must come there. "
            "Look whether each was started and reaches that address, then start all again."
        ) from error
    try:
        yield
    except BaseException:
        # Not politely: what is under way may wait for a process that died.
        group = distributed.group.WORLD
        if group is not None:
            group.abort()
        raise
    finally:
        distributed.destroy_process_group()


def _meeting_place(launch: Launch, timeout: float) -> distributed.Store:
    """A store that only these processes use.

    torchrun keeps one store over its restarts (``--max-restarts``), and torch names its keys alike
    each time: started again, processes would call on the addresses of those that died, and hang
    (pytorch issue 135712; the count of restarts is no remedy, as each machine has its own). So
    they agree on a name for this start.
    """
    if launch.size == 1:
        # Nobody to meet: it may be started without torchrun.
        return distributed.HashStore()
    within = timedelta(seconds=timeout)
    store, *_ = next(distributed.rendezvous("env://", launch.rank, launch.size, timeout=within))
    store.set_timeout(within)
    return distributed.PrefixStore(_name_of_this_start(launch, store, timeout), store)


def _name_of_this_start(launch: Launch, store: distributed.Store, timeout: float) -> str:
    """What process 0 calls it. The others say who they are, and take no answer but one to that;
    what a former start left in the store is answered too, and heard by nobody."""
    own = uuid4().hex
    if launch.rank:
        store.set(f"distill/here/{launch.rank}", own)
        name = store.get(f"distill/answer/{own}").decode()
        store.set(f"distill/heard/{name}/{launch.rank}", "")
        return name
    missing = set(range(1, launch.size))
    answered: set[str] = set()
    until = time.monotonic() + timeout
    while missing:
        for rank in tuple(missing):
            here = f"distill/here/{rank}"
            if store.check([f"distill/heard/{own}/{rank}"]):
                missing.discard(rank)
            elif store.check([here]) and (who := store.get(here).decode()) not in answered:
                store.set(f"distill/answer/{who}", own)
                answered.add(who)
        if missing and time.monotonic() > until:
            raise RuntimeError(f"no word of rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(_LOOK_SECONDS)
    return own
