"""Export when the run is complete, also of weights that lie in shards on several ranks."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from attrs import frozen
from distill_protocols import (
    Callback,
    CapabilityError,
    CheckpointError,
    Exporter,
    RoleError,
    RoleSpec,
    RunState,
    SamplerSpec,
    TensorInfo,
    TensorWeights,
    WeightSource,
)
from distill_runtime import Ranks
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from distill_checkpoint.config import ExportConfig
from distill_checkpoint.tensors import new_checkpoint_group, to_full

logger = logging.getLogger(__name__)


class ExportCallback(Callback):
    """Writes roles where other tools read them, when all steps are done.

    A run that was asked to stop exports nothing: it is not finished, its checkpoint is what it
    goes on from, and who stops a run waits for it. An export that fails raises.

    On several ranks every one has this callback: rank 0 writes, and the others give it their
    shards, one tensor at a time. An error of one is an error of all.

    Args:
        exports: what to write.
        exporter: the family's.
        roles: where each role came from, by name.
        output_dir: ``ExportConfig.folder`` is relative to it.
        timeout: seconds after which a rank that does not answer is given up.
    """

    name = "export"

    def __init__(
        self,
        exports: Sequence[ExportConfig],
        exporter: Exporter,
        roles: Mapping[str, RoleSpec],
        output_dir: Path | str,
        *,
        timeout: float = 1800.0,
    ) -> None:
        self.exports = tuple(exports)
        self.exporter = exporter
        self.roles = dict(roles)
        self.output_dir = Path(output_dir)
        self.timeout = timeout
        self._checked = False

    def on_step_start(self, run: RunState) -> None:
        """Refuse now what could not be exported after days of training.

        In the first step rather than at ``on_train_start``: averages are made there.

        Raises:
            RoleError: a role to export, or its EMA, does not exist.
            CapabilityError: the method does not say how its student is sampled.
        """
        if self._checked:
            return
        for export in self.exports:
            _sampler_of(run)
            role = run.method.bundle[export.role]
            if export.ema and role.modules.keys() - role.ema.keys():
                raise RoleError(
                    f"an export asks for the EMA weights of {export.role!r}, which keeps none: "
                    "there would be nothing to export at the end. Let the run average that role, "
                    "or set ema: false."
                )
        self._checked = True

    def on_train_end(self, run: RunState) -> None:
        """Export everything, or log why not."""
        if not self.exports:
            return
        if run.iteration < run.max_train_steps:
            if run.ranks.is_first:
                logger.warning(
                    "nothing exported: the run stopped at iteration %d of %d (%s). Resume it to "
                    "the end, which exports.",
                    run.iteration,
                    run.max_train_steps,
                    run.stop_reason or "no reason given",
                )
            return
        ranks = new_checkpoint_group(self.timeout)
        for export in self.exports:
            weights = run.method.bundle[export.role].weight_sources(ema=export.ema)
            write = functools.partial(self._export, export, _sampler_of(run))
            gather_on_rank0(ranks, weights, write)

    def _export(
        self, export: ExportConfig, sampler: SamplerSpec, weights: Mapping[str, WeightSource]
    ) -> None:
        folder = self.output_dir / export.folder
        role, request = self.roles[export.role], export.request(sampler)
        record = self.exporter.export(role, weights, folder, request)
        logger.info(
            "exported %s (%s weights, %s) to %s",
            export.role,
            "EMA" if export.ema else "live",
            export.format,
            folder,
        )
        for note in record["notes"]:
            logger.info("  note: %s", note)
        if export.verify:
            for note in self.exporter.verify(role, weights, folder, request)["notes"]:
                logger.info("  verified: %s", note)


def _sampler_of(run: RunState) -> SamplerSpec:
    spec = run.method.sampler_spec
    if spec is None:
        raise CapabilityError(
            f"{type(run.method).__name__} has no sampler_spec, and an export without one leaves "
            "its users to guess steps and shift. Give the method one, or export nothing."
        )
    return spec


# -- sharded weights, read by rank 0 --------------------------------------------------------------

TensorRequest = tuple[str, str] | None
"""(module, name) of the tensor that rank 0 reads next; None: it is done."""


def gather_on_rank0(
    ranks: Ranks,
    weights: Mapping[str, TensorWeights],
    action: Callable[[Mapping[str, WeightSource]], None],
) -> None:
    """Call ``action`` on rank 0 with sources of full tensors, which the other ranks help to gather.

    Only rank 0 knows which tensors ``action`` reads, and in which order; but gathering a sharded
    one takes all ranks. So rank 0 broadcasts each request, and the others answer until it is done.
    A full tensor is on each rank only while it is read, and one at a time.

    Args:
        ranks: all of them call this together.
        weights: by module, of this rank: shards (DTensor) or full tensors.

    Raises:
        DistillError: ``action`` failed, or a rank was lost: an error on all.
    """
    sources = {key: GatheredWeights(own, key, ranks) for key, own in weights.items()}
    if ranks.group is None:
        action(sources)
    elif ranks.is_first:
        ranks.gather_results(lambda: _act_and_dismiss(ranks, sources, action))
    else:
        ranks.gather_results(lambda: _answer_requests(ranks, weights))


@frozen(eq=False)
class GatheredWeights(WeightSource):
    """The source of one module on rank 0, within ``gather_on_rank0``."""

    weights: TensorWeights
    _key: str
    _ranks: Ranks

    @property
    def where(self) -> str:
        return self.weights.where

    def describe(self) -> Mapping[str, TensorInfo]:
        """Describe full tensors, not shards."""
        return self.weights.describe()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of ``names`` on the CPU, put together from the shards of all ranks."""
        tensors = {}
        for name in names:
            tensor = self.weights.tensors[name].detach()
            if isinstance(tensor, DTensor):
                # The other ranks wait in `_answer_requests`, and enter the same gather.
                _broadcast_request(self._ranks, (self._key, name))
                with self._ranks.within_timeout():
                    tensor = to_full(tensor)
            tensors[name] = tensor.cpu()
        return tensors


def _act_and_dismiss(
    ranks: Ranks,
    sources: Mapping[str, WeightSource],
    action: Callable[[Mapping[str, WeightSource]], None],
) -> None:
    """Rank 0's half: without the last broadcast the others would wait until their timeout."""
    try:
        action(sources)
    except BaseException:
        # The error under way is the one to report, not that nobody listens any more.
        with contextlib.suppress(CheckpointError):
            _broadcast_request(ranks, None)
        raise
    _broadcast_request(ranks, None)


def _answer_requests(ranks: Ranks, weights: Mapping[str, TensorWeights]) -> None:
    """The half of the other ranks: enter each gather that rank 0 asks for, and drop the result."""
    while (request := _broadcast_request(ranks, None)) is not None:
        key, name = request
        with ranks.within_timeout():
            to_full(weights[key].tensors[name].detach())


def _broadcast_request(ranks: Ranks, request: TensorRequest) -> TensorRequest:
    """Rank 0's ``request``, on every rank; that of the others is ignored."""
    if ranks.group is None:
        return request
    requests = [request]
    with ranks.within_timeout():
        distributed.broadcast_object_list(requests, src=0, group=ranks.group)
    return requests[0]
