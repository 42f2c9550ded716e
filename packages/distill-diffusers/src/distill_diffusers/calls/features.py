"""Hidden states of a transformer's blocks, caught in a call.

Letters: B batch, D width, L tokens; T', H', W' the clip in patches, L = T' H' W'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping, Sequence
from functools import partial
from typing import Any

from distill_protocols import ContractError
from torch import Tensor, nn

from distill_diffusers.roles.discriminator import block_problem

Features = MutableMapping[int, Tensor | None]
"""By block index."""


@contextlib.contextmanager
def caught(transformer: Any, features: Features, latents: Sequence[int]) -> Iterator[None]:
    """Around one call, which returns a tuple: then ``features`` hold what the blocks that are its
    keys gave, fp32 [B, D, T', H', W'], with gradient if the call had it.

    Args:
        latents: shape [B, C, T, H, W] of the call.

    Raises:
        ContractError: a key is no block of the transformer.
    """
    blocks = {index: _block(transformer, index) for index in features}
    found: dict[int, Tensor] = {}
    patches = [n // p for n, p in zip(latents[2:], transformer.config.patch_size, strict=True)]

    def outputs_with_features(_module: object, _inputs: object, output: tuple[Tensor]) -> Any:
        return (*output, *(found[index] for index in features))

    def outputs_alone(_module: object, _inputs: object, output: tuple[Tensor, ...]) -> Any:
        # Here and not in the blocks: what hooks there compute would be part of a checkpointed
        # block, which is called again in the backward pass, without them.
        for index, hidden in zip(list(features), output[1:], strict=True):
            features[index] = hidden.float().transpose(1, 2).unflatten(2, patches)
        return output[:1]

    with contextlib.ExitStack() as hooks:
        for index, block in blocks.items():
            keep = block.register_forward_hook(partial(_keep, found, index))
            hooks.callback(keep.remove)
        # Around all other hooks of the model, to which features are outputs like v: of a sharded
        # one, those gather its weights again when the gradient of an output comes.
        first = transformer.register_forward_hook(outputs_with_features, prepend=True)
        hooks.callback(first.remove)
        last = transformer.register_forward_hook(outputs_alone)
        hooks.callback(last.remove)
        yield


def _block(transformer: Any, index: int) -> nn.Module:
    problem = block_problem(index, len(transformer.blocks))
    if problem is not None:
        raise ContractError(f"features of {problem}. Ask for one of those")
    return transformer.blocks[index]


def _keep(
    found: dict[int, Tensor], index: int, _module: nn.Module, _inputs: object, output: Tensor
) -> None:
    found[index] = output
