"""Hidden states of a transformer's blocks, collected during a call.

Letters: B batch, D width, L tokens; T', H', W' the clip in patches, L = T' H' W'.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, MutableMapping, Sequence
from functools import partial
from typing import Any, cast

from attrs import frozen
from distill_protocols import ContractError
from torch import Tensor, nn

from distill_diffusers.architecture import block_problem
from distill_diffusers.calls.tokens import unpack

Features = MutableMapping[int, Tensor | None]
"""Hidden states by block index."""


@frozen(kw_only=True)
class FeatureLayout:
    """Where a transformer's hidden states are, and how their tokens lie in the clip.

    Attributes:
        blocks: dotted name of the module list whose entries are the blocks.
        patches: (T', H', W'): the clip's size in tokens, the last running fastest.
        output: which element of a block's output is the latents' hidden state, where a block
            returns a tuple (SD 3's joint blocks return text first: 1); None: it returns a tensor.
        others_follow: whether tokens of something else, such as a text, come after the latents'.
    """

    blocks: str
    patches: Sequence[int]
    output: int | None = None
    others_follow: bool = False


@contextlib.contextmanager
def collect_features(
    transformer: nn.Module, features: Features, layout: FeatureLayout
) -> Iterator[None]:
    """Fill ``features`` during the one call that is made within, with ``return_dict=False``.

    Afterwards each key's value is what the block of that index returned, fp32 [B, D, T', H', W'],
    with gradient if the call had it.

    Raises:
        ContractError: a key is no block of the transformer.
    """
    # The blocks are those of a module list, so their number is its length.
    blocks = cast(nn.ModuleList, transformer.get_submodule(layout.blocks))
    for index in features:
        problem = block_problem(index, len(blocks))
        if problem is not None:
            raise ContractError(f"features of {problem}. Ask for one of those")
    hidden_states: dict[int, Tensor] = {}

    def keep(index: int, _module: nn.Module, _inputs: object, output: Any) -> None:
        hidden_states[index] = output if layout.output is None else output[layout.output]

    def append_features(_module: object, _inputs: object, output: tuple[Tensor, ...]) -> Any:
        return (*output, *(hidden_states[index] for index in features))

    def take_features(_module: object, _inputs: object, output: tuple[Tensor, ...]) -> Any:
        # Here and not in the blocks: what hooks there compute would be part of a checkpointed
        # block, which is called again in the backward pass, without them.
        first = len(output) - len(features)
        for index, hidden in zip(list(features), output[first:], strict=True):
            # Tokens before those of the clip are of given frames.
            count = math.prod(layout.patches)
            tokens = hidden[:, :count] if layout.others_follow else hidden[:, -count:]
            features[index] = unpack(tokens.float(), layout.patches)
        return output[:first]

    with contextlib.ExitStack() as hooks:
        for index in features:
            hook = blocks[index].register_forward_hook(partial(keep, index))
            hooks.callback(hook.remove)
        # Around all other hooks of the model, to which features are outputs like v: FSDP gathers a
        # sharded model's weights again when the gradient of one of its outputs comes.
        first_hook = transformer.register_forward_hook(append_features, prepend=True)
        hooks.callback(first_hook.remove)
        last_hook = transformer.register_forward_hook(take_features)
        hooks.callback(last_hook.remove)
        yield
