"""What one call takes beside its weights: the family's own module, run on fake tensors."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from attrs import evolve, frozen
from distill_protocols import DTYPES, CallPlan, RoleHandle, RoleSpec, WeightsError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from distill_diffusers.architecture import build_on_meta, inspect_model
from distill_diffusers.building import plain_tables
from distill_diffusers.kinds import ModelKind
from distill_diffusers.lora import adapted_layers
from distill_diffusers.model_configs import read_integer
from distill_diffusers.planning.modules import stored_dtype
from distill_diffusers.roles import attention
from distill_diffusers.roles.discriminator import HEADS, build_heads, logits
from distill_diffusers.roles.injection import inject

LATENTS = "latents"
"""The input of a call that may take a gradient."""

ModelCall: TypeAlias = Callable[[RoleHandle, Mapping[str, Tensor]], Tensor]
"""Calls the first module of a role on inputs by name, as the family's adapter does, and gives its
output. The inputs are all that such a call has beside weights: ``latents`` first."""


@frozen(kw_only=True)
class CallBytes:
    """Bytes that are alive beside weights and their gradients.

    The first three grow by the same for each further block; ``outside`` does not.

    Attributes:
        held: between forward and backward.
        forward: most at once, from the last block on.
        backward: most at once, to the end of the last block's.
        outside: most at once before and after these.
        held_of: by block, those of ``held`` that were made from its call on to the next one's.
        entered: by block, what was alive when it was called.
    """

    held: int
    forward: int
    backward: int
    outside: int
    held_of: Mapping[str, int]
    entered: Mapping[str, int]

    @property
    def most(self) -> int:
        """The most at once, at any moment."""
        return max(self.forward, self.backward, self.outside)

    def with_more_blocks(self, name: str, count: int) -> CallBytes:
        """Add ``count`` more blocks to the list ``name``, each like its second of three.

        Casts of weights are kept to the end of a forward pass, and may be gone after it.
        """
        held = count * self.held_of[f"{name}.1"]
        return evolve(
            self,
            held=self.held + held,
            forward=self.forward + count * (self.entered[f"{name}.2"] - self.entered[f"{name}.1"]),
            backward=self.backward + held,
        )


def plan_call(
    kind: ModelKind,
    config: Mapping[str, object],
    role: RoleSpec,
    call: ModelCall,
    shapes: Mapping[str, Sequence[int]],
    *,
    input_gradient: bool = False,
) -> CallPlan:
    """Plan a call from a model of three blocks in each of its lists, as each further block adds
    what the second one does.

    Not the first, whose input comes from the embedding and takes no gradient in a LoRA role, and
    not the last, in which most is alive at once.

    Nothing is computed and no memory taken: tensors are fake ones of the CPU, whose autocast
    casts as an accelerator's does, and attention is its flash kernel (no matrix of tokens by
    tokens). Weights in 16 bits that autocast makes of fp32 ones are counted.

    Args:
        config: of the transformer; of two experts either, as one is called at a time.
        call: how the family calls it.
        shapes: of all inputs of the call, batch included.
        input_gradient: whether the call is differentiated by its latents, though the role is not
            trained.

    Raises:
        WeightsError: a call cannot be made: layers do not fit each other, or the inputs.
    """
    architecture = inspect_model(kind, config)
    blocks = {name: read_integer(architecture.config, name) for name in kind.depths}
    few = {name: min(count, 3) for name, count in blocks.items()}
    plan = _plan_of(kind, config, few, role, call, shapes, input_gradient)
    for name, count in zip(architecture.block_lists, blocks.values(), strict=False):
        if count > 3:
            plan = plan.with_more_blocks(name, count - 3)
    return CallPlan(held=plan.held if role.trainable else 0, most=plan.most)


def plan_discriminator_call(
    kind: ModelKind,
    config: Mapping[str, object],
    role: RoleSpec,
    *,
    batch: int,
    cells: Sequence[int],
) -> CallPlan:
    """Plan a call of a discriminator on the features of one call of the transformer of ``config``.

    Args:
        batch: clips.
        cells: (T, H, W) of a clip in tokens.
    """
    assert role.heads is not None
    module = build_heads(inspect_model(kind, config).width, role.heads)
    with FakeTensorMode():
        gathered = role.fsdp.mixed_precision if role.fsdp else None
        for name, parameter in list(module.named_parameters()):
            fake = torch.empty(parameter.shape, dtype=DTYPES[gathered or "fp32"])
            _replace(module, name, nn.Parameter(fake))
        handle = RoleHandle(
            name=role.name,
            modules={HEADS: module},
            trainable=role.trainable,
            precision=role.precision,
            discriminator=role.heads,
        )
        features = {i: torch.empty(batch, module.features, *cells) for i in role.heads.blocks}
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        alive = _LiveBytes([*module.parameters(), *features.values()])
        with alive, torch.set_grad_enabled(role.trainable):
            loss = logits(handle, features).square().mean()
            held = alive.now
            if role.trainable:
                loss.backward()
    return CallPlan(held=held if role.trainable else 0, most=alive.take_peak())


def _plan_of(
    kind: ModelKind,
    config: Mapping[str, object],
    depths: Mapping[str, int],
    role: RoleSpec,
    call: ModelCall,
    shapes: Mapping[str, Sequence[int]],
    input_gradient: bool,
) -> CallBytes:
    """Measure a call of a model of so many blocks on fake tensors; see ``plan_call``."""
    config = {**config, **depths}
    architecture = inspect_model(kind, config)
    module = build_on_meta(kind, config)
    name = kind.modules[0]
    trained = None
    if role.lora is not None:
        trained = {name: inject(module, adapted_layers(architecture, role.lora), role.lora)}
    if (role.trainable or input_gradient) and role.activation_checkpointing:
        module.enable_gradient_checkpointing()
    if role.attention_backend == "_native_math":
        # The one kernel that keeps a matrix of tokens by tokens; the others take what flash does.
        attention.set_backend(module, role.attention_backend)
    with FakeTensorMode():
        _fill_with_fakes(kind, module, role, architecture.kept_in_fp32)
        handle = RoleHandle(
            name=role.name,
            modules={name: module},
            trainable=role.trainable,
            precision=role.precision,
            blocks={name: architecture.blocks},
            trained=trained,
        )
        inputs = {key: torch.empty(tuple(shape)) for key, shape in shapes.items()}
        inputs[LATENTS].requires_grad_(input_gradient)
        try:
            return measure_call(handle, call, inputs)
        except RuntimeError as error:
            raise WeightsError(
                f"a call of the transformer of {role.path} fails: {error} Its config.json states "
                "layers that do not fit each other, or the clips and conditions of the run. Take "
                "the model's own config.json"
            ) from error


def _fill_with_fakes(
    kind: ModelKind, module: nn.Module, role: RoleSpec, kept_in_fp32: frozenset[str]
) -> None:
    """Give a module fake weights of the types that a call sees."""
    gathered = role.fsdp.mixed_precision if role.fsdp else None
    stored_like, _, _ = kind.stored_like.rpartition(".")
    for name, old in list(module.named_parameters()):
        # The adapter chooses the precision of a call by how this layer is stored.
        if gathered is None or name.rpartition(".")[0] == stored_like:
            dtype = stored_dtype(name, role, kept_in_fp32)
        else:
            dtype = DTYPES[gathered]
        _replace(module, name, nn.Parameter(torch.empty(old.shape, dtype=dtype)))
    for name, old in list(module.named_buffers()):
        layer, _, end = name.rpartition(".")
        module.get_submodule(layer).register_buffer(end, torch.empty(old.shape, dtype=old.dtype))
    for part, name, old in list(plain_tables(module)):
        setattr(part, name, torch.empty(old.shape, dtype=old.dtype))


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    layer, _, end = name.rpartition(".")
    module.get_submodule(layer).register_parameter(end, parameter)


def measure_call(role: RoleHandle, call: ModelCall, inputs: Mapping[str, Tensor]) -> CallBytes:
    """Measure one call of ``role``, fake or real, on the CPU.

    With its backward pass, if the role is trained or the latents take a gradient.
    """
    name, module = next(iter(role.modules.items()))
    tables = [table for _, _, table in plain_tables(module)]
    alive = _LiveBytes([*module.parameters(), *module.buffers(), *tables, *inputs.values()])
    hooks: list[Any] = [
        # Gradients are counted elsewhere; here each goes as soon as it is there.
        p.register_post_accumulate_grad_hook(_drop_gradient)
        for p in module.parameters()
        if p.requires_grad
    ]
    before: list[int] = []
    backward: list[int] = []
    entered: dict[str, int] = {}
    last = role.blocks[name][-1]

    def enter(block: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if block in entered:
            return  # once more, for the backward pass of a checkpointed block
        entered[block] = alive.now
        alive.maker = block
        if block != last:
            return
        before.append(alive.take_peak())
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: backward.append(alive.take_peak()))

    for block in role.blocks[name]:

        def enter_block(_: nn.Module, args: Any, kwargs: Any, block: str = block) -> None:
            enter(block, args, kwargs)

        layer = module.get_submodule(block)
        hooks.append(layer.register_forward_pre_hook(enter_block, with_kwargs=True))
    is_differentiated = role.trainable or inputs[LATENTS].requires_grad
    with alive, _without_fusion_warnings(), torch.set_grad_enabled(is_differentiated):
        loss = call(role, inputs).float().square().mean()
        held, held_of, forward = alive.now, dict(alive.made), alive.take_peak()
        if is_differentiated:
            loss.backward()
    for hook in hooks:
        hook.remove()
    rest = max(*before, alive.take_peak())
    return CallBytes(
        held=held,
        forward=forward,
        backward=max(backward, default=rest),
        outside=rest,
        held_of=held_of,
        entered=entered,
    )


@contextlib.contextmanager
def _without_fusion_warnings() -> Iterator[None]:
    """Silence torch's warning that the norm of q and k is not fused for mixed types: it is as
    meant, and a run gives it too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still alive.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.maker = ""
        """Who makes storages from now on."""
        self.made: Counter[str] = Counter()
        """Of ``now``, by who made it."""
        self._peak = 0
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size, maker = storage._cdata, storage.nbytes(), self.maker
        if key in self._seen:
            return

        def free(_: Any) -> None:
            self._seen.pop(key, None)
            self.now -= size
            self.made[maker] -= size

        self._seen[key] = weakref.ref(storage, free)
        self.now += size
        self.made[maker] += size
        self._peak = max(self._peak, self.now)

    def take_peak(self) -> int:
        """Give the most bytes at once since the last call of this method."""
        peak, self._peak = self._peak, self.now
        return peak
