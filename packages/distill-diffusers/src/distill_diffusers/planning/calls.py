"""What one call takes beside its weights: the family's own module, run on fake tensors."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from distill_adapters_wan.calling import call_transformer, transformer_of
from distill_adapters_wan.causal.roles import token_times
from distill_protocols import DTYPES, CallPlan, RoleHandle, RoleSpec
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from distill_diffusers.planning.modules import on_meta, stored_dtype
from distill_diffusers.roles.discriminator import HEADS, heads_on_meta, logits
from distill_diffusers.roles.injection import inject
from distill_diffusers.roles.lora import DEFAULTS, adapted_layers


@frozen(kw_only=True)
class CallBytes:
    """Bytes that are alive beside weights and their gradients.

    The first three grow by the same for each further block; ``else_`` does not.

    Attributes:
        held: between forward and backward.
        forward: most at once, from the last block on.
        backward: most at once, to the end of the last block's.
        else_: most at once before and after these.
    """

    held: int
    forward: int
    backward: int
    else_: int

    @property
    def most(self) -> int:
        return max(self.forward, self.backward, self.else_)

    def plus(self, longer: CallBytes, times: int) -> CallBytes:
        """With ``times`` more blocks, where ``longer`` has one more than this."""
        return CallBytes(
            held=self.held + times * (longer.held - self.held),
            forward=self.forward + times * (longer.forward - self.forward),
            backward=self.backward + times * (longer.backward - self.backward),
            else_=self.else_,
        )


def plan_call(
    config: Mapping[str, Any],
    role: RoleSpec,
    *,
    latents: Sequence[int],
    text: Sequence[int],
    image: Sequence[int] | None = None,
    frame_times: bool = False,
    judges: bool = False,
) -> CallPlan:
    """From models of two and of three blocks, as each further block adds the same.

    Not of one, which is the first and the last block at once: its input comes from the embedding,
    and takes no gradient in a LoRA role.

    Nothing is computed and no memory taken: tensors are fake ones of the CPU, whose autocast
    casts as an accelerator's does, and attention is its flash kernel (no matrix of tokens by
    tokens). Weights in 16 bits that autocast makes of fp32 ones are counted.

    Args:
        config: of the transformer; of two experts either, as one is called at a time.
        latents: [B, C, T, H, W] of the call, with the channels that bring a picture.
        text: [B, L, D] of the call.
        image: [B, tokens, D] of a picture's embedding, where the model reads one.
        frame_times: whether each frame has a t of its own, as where one of them is given.
        judges: whether the call is differentiated by its latents, though the role does not learn.
    """
    shapes = _Shapes(
        latents=latents, text=text, image=image, frame_times=frame_times, judges=judges
    )
    blocks = config.get("num_layers", DEFAULTS["num_layers"])
    found = measured({**config, "num_layers": min(blocks, 2)}, role, shapes)
    if blocks > 2:
        three = measured({**config, "num_layers": 3}, role, shapes)
        found = found.plus(three, blocks - 2)
    return CallPlan(held=found.held if role.trainable else 0, most=found.most)


def plan_heads_call(
    config: Mapping[str, Any], role: RoleSpec, *, latents: Sequence[int]
) -> CallPlan:
    """Of a discriminator, on the features of one call of the transformer of ``config``.

    Args:
        latents: [B, C, T, H, W] of that call.
    """
    assert role.heads is not None
    module = heads_on_meta(config, role.heads)
    patches = {**DEFAULTS, **config}["patch_size"]
    cells = [n // p for n, p in zip(latents[2:], patches, strict=True)]
    with FakeTensorMode():
        _fill_with_fakes(module, role)
        handle = RoleHandle(
            name=role.name,
            modules={HEADS: module},
            trainable=role.trainable,
            precision=role.precision,
            discriminator=role.heads,
        )
        features = {i: torch.empty(latents[0], module.features, *cells) for i in role.heads.blocks}
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        alive = _Alive([*module.parameters(), *features.values()])
        with alive, torch.set_grad_enabled(role.trainable):
            loss = logits(handle, features).square().mean()
            held = alive.now
            if role.trainable:
                loss.backward()
    return CallPlan(held=held if role.trainable else 0, most=alive.lap())


@frozen(kw_only=True)
class _Shapes:
    """See ``plan_call``."""

    latents: Sequence[int]
    text: Sequence[int]
    image: Sequence[int] | None = None
    frame_times: bool = False
    judges: bool = False


def measured(config: Mapping[str, Any], role: RoleSpec, shapes: _Shapes) -> CallBytes:
    """Of the whole model of ``config``, block by block; see ``plan_call``."""
    module = on_meta(config, role.path)
    trained = None
    if role.lora is not None:
        trained = inject(module, adapted_layers(dict(module.config), role.lora), role.lora)
    if (role.trainable or shapes.judges) and role.activation_checkpointing:
        module.enable_gradient_checkpointing()
    with FakeTensorMode():
        _fill_with_fakes(module, role)
        handle = RoleHandle(
            name=role.name,
            modules={"transformer": module},
            trainable=role.trainable,
            precision=role.precision,
            trained=None if trained is None else {"transformer": trained},
        )
        return watch(
            handle,
            torch.empty(tuple(shapes.latents), requires_grad=shapes.judges),
            torch.empty(tuple(shapes.text)),
            None if shapes.image is None else torch.empty(tuple(shapes.image)),
            frame_times=shapes.frame_times,
        )


def _fill_with_fakes(module: nn.Module, role: RoleSpec) -> None:
    """Weights of the types that a call sees."""
    gathered = role.fsdp.mixed_precision if role.fsdp else None
    for name, old in list(module.named_parameters()):
        # The adapter looks at how this one is stored to choose the precision of a call.
        if gathered is None or name.startswith("patch_embedding."):
            dtype = stored_dtype(name, role)
        else:
            dtype = DTYPES[gathered]
        layer, _, end = name.rpartition(".")
        new = nn.Parameter(torch.empty(old.shape, dtype=dtype))
        module.get_submodule(layer).register_parameter(end, new)
    for name, old in list(module.named_buffers()):
        layer, _, end = name.rpartition(".")
        module.get_submodule(layer).register_buffer(end, torch.empty(old.shape, dtype=old.dtype))


def watch(
    role: RoleHandle,
    x_t: Tensor,
    text: Tensor,
    image: Tensor | None = None,
    *,
    frame_times: bool = False,
) -> CallBytes:
    """One call of ``role``, fake or real, with its backward pass if it learns or ``x_t`` takes a
    gradient."""
    module = transformer_of(role)
    t = torch.ones((len(x_t), x_t.shape[2]) if frame_times else len(x_t))
    given = [value for value in (x_t, text, t, image) if value is not None]
    alive = _Alive([*module.parameters(), *module.buffers(), *given])
    hooks: list[Any] = [
        # Gradients are counted elsewhere; here each goes as soon as it is there.
        p.register_post_accumulate_grad_hook(_drop_gradient)
        for p in module.parameters()
        if p.requires_grad
    ]
    before: list[int] = []
    backward: list[int] = []

    def entered(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if before:
            return  # once more, for the backward pass
        before.append(alive.lap())
        if args[0].requires_grad:
            args[0].register_hook(lambda _: backward.append(alive.lap()))

    hooks.append(transformer_of(role).blocks[-1].register_forward_pre_hook(entered))
    differentiated = role.trainable or x_t.requires_grad
    with alive, _quiet(), torch.set_grad_enabled(differentiated):
        times = token_times(module, x_t, t)
        loss = call_transformer(role, x_t, times, text, image).float().square().mean()
        held, forward = alive.now, alive.lap()
        if differentiated:
            loss.backward()
    for hook in hooks:
        hook.remove()
    rest = max(*before, alive.lap())
    return CallBytes(held=held, forward=forward, backward=max(backward, default=rest), else_=rest)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's word that the norm of q and k is not fused for mixed types: it is as meant,
    and a run would say it too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Alive(TorchDispatchMode):
    """Counts bytes of the storages that operations make and nobody has let go.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self._most = 0
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self._most = max(self._most, self.now)

    def lap(self) -> int:
        """Most at once since the last call of this."""
        most, self._most = self._most, self.now
        return most
