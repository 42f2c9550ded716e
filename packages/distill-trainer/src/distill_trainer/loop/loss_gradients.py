"""What each loss of a step contributes to the gradients of the modules that it trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from attrs import frozen
from distill_protocols import TrainableMethod
from distill_runtime import is_sharded
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from distill_trainer.distribution.tensors import total_norm

PREFIX = "loss_grad_norm/"
"""Before ``<role.module>/<loss>`` in the names of the metrics."""


@frozen(kw_only=True, eq=False)
class LossGradients:
    """Gradients of one micro batch, of this process, loss by loss.

    Attributes:
        norms: ``(role.module, loss)`` -> L2 norm of the part of the gradient that the loss, with
            its weight in the total, adds; of modules that several losses reach. A norm of a sum is
            no sum of norms: parts may point against each other.
        alone: of each other module the one loss that reaches it, whose part is the whole gradient.
    """

    norms: Mapping[tuple[str, str], Tensor]
    alone: Mapping[str, str]

    def joined(self, other: LossGradients) -> LossGradients:
        """Return those of two turns, which have no module in common."""
        return LossGradients(
            norms={**self.norms, **other.norms}, alone={**self.alone, **other.alone}
        )

    def metrics(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``loss_grad_norm/<role.module>/<loss>``.

        Args:
            whole: norms of whole gradients, as ``grad_norm/<role.module>``.
        """
        metrics = {f"{PREFIX}{key}/{loss}": norm for (key, loss), norm in self.norms.items()}
        metrics |= {
            f"{PREFIX}{key}/{loss}": whole[name]
            for key, loss in self.alone.items()
            if (name := f"grad_norm/{key}") in whole
        }
        return metrics


NOTHING = LossGradients(norms={}, alone={})


def measure_losses(
    method: TrainableMethod, iteration: int, loss_map: Mapping[str, Tensor]
) -> LossGradients:
    """Differentiate the losses of a step one by one, before the total is; no gradient of a
    parameter changes. A loss that reaches a module alone costs no pass.

    Sharded weights are left out: what the graph has of them are gathered copies, whose gradients
    FSDP would reduce in each pass.

    Args:
        loss_map: of ``single_train_step``, with its graph.

    Raises:
        RuntimeError: torch cannot walk the graph twice (compiled blocks give its buffers away), or
            has not the memory.
    """
    parameters = {
        key: [p for group in optimizer.param_groups for p in group["params"]]
        for key, optimizer in method.get_optimizers(iteration).items()
    }
    if any(is_sharded(p) for module in method.model_dict.values() for p in module.parameters()):
        return NOTHING
    total = loss_map["total_loss"]
    terms = {n: v for n, v in loss_map.items() if n != "total_loss" and v.requires_grad}
    if not terms:
        return NOTHING
    # The derivative of the total by a term is the term's weight in it, whatever the method calls
    # that. None: the total does not have the term.
    weights = torch.autograd.grad(total, [*terms.values()], retain_graph=True, allow_unused=True)
    weighted = {n: w for n, w in zip(terms, weights, strict=True) if w is not None}
    leaves = {
        get_gradient_edge(p).node: key
        for key, own in parameters.items()
        for p in own
        if p.requires_grad
    }
    reached = {name: _find_reached(terms[name], leaves) for name in weighted}
    losses_of = {key: [n for n, keys in reached.items() if key in keys] for key in parameters}
    norms: dict[tuple[str, str], Tensor] = {}
    scale = method.grad_scaler.get_scale() if method.grad_scaler.is_enabled() else 1.0
    for name, weight in weighted.items():
        shared = [k for k, names in losses_of.items() if name in names and len(names) > 1]
        parts = _gradients(terms[name], weight * scale, {k: parameters[k] for k in shared})
        norms |= {(key, name): total_norm(part) / scale for key, part in parts.items() if part}
    alone = {key: names[0] for key, names in losses_of.items() if len(names) == 1}
    return LossGradients(norms=norms, alone=alone)


def _gradients(
    loss: Tensor, weight: Tensor, parameters: Mapping[str, Sequence[nn.Parameter]]
) -> dict[str, list[Tensor]]:
    """Return by module what ``weight * loss`` has as gradients."""
    flat = [p for own in parameters.values() for p in own]
    if not flat:
        return {}
    found = iter(torch.autograd.grad(loss, flat, weight, retain_graph=True, allow_unused=True))
    by_key = {key: [next(found) for _ in own] for key, own in parameters.items()}
    return {key: [g for g in own if g is not None] for key, own in by_key.items()}


def _find_reached(loss: Tensor, leaves: Mapping[Node, str]) -> Collection[str]:
    """Return the modules of those ``leaves`` that are in the graph of ``loss``."""
    reached: set[str] = set()
    seen: set[Node] = set()
    waiting: list[Node | None] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in leaves:
            reached.add(leaves[node])
        waiting.extend(parent for parent, _ in node.next_functions)
    return reached
