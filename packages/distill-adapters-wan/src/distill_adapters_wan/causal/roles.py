"""Block-causal attention on diffusers' own WanTransformer3DModel, without a copy of it.

Three things are put on a causal role's transformer:

- a pre-hook, which takes the argument ``causal=`` (a ``CausalCall``) out of a call;
- hooks on its ``rope``, which give each block a ``BlockContext`` in the place of rotary tables;
- an attention processor on each block's self-attention, which reads that context.

What a block computes is thereby a function of its arguments alone. Activation checkpointing may
call it again later, on another thread, after the caches have changed, and it computes the same.
It also keeps FSDP from casting the rotary tables to 16 bits on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from attrs import Factory, define, field, frozen
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel
from distill_protocols import (
    CapabilityError,
    Chunk,
    ChunkCall,
    CleanPast,
    ContractError,
    ModelBundle,
    WeightsError,
)
from torch import Tensor, nn

from distill_adapters_wan.causal import layout
from distill_adapters_wan.causal.config import CausalConfig, causal_problems
from distill_adapters_wan.causal.kv_cache import (
    Caller,
    KeysAndValues,
    KvCaches,
    Past,
    Place,
    StoredChunk,
)
from distill_adapters_wan.causal.layout import Group, Layout, Span

_ARGUMENT = "causal"


class CausalRoles:
    """The causal roles of an adapter and their caches.

    Args:
        config: which roles are causal, and how; None: none is.

    Raises:
        RoleError: a causal role that the bundle does not have.
        WeightsError: a transformer that cannot be causal.
        ContractError: an earlier adapter made a role causal that is not causal here.
    """

    def __init__(self, bundle: ModelBundle, config: CausalConfig | None) -> None:
        self._bundle = bundle
        self._config = config
        self._caches = KvCaches()
        names = config.roles if config is not None else ()
        bundle.require_roles(names)
        models = {name: role for name, role in bundle.roles.items() if role.discriminator is None}
        for name, role in models.items():
            for key, module in role.transformers.items():
                _prepare(f"{name}.{key}", module, config if name in names else None)

    def config_of(self, role: str) -> CausalConfig | None:
        """Return how ``role`` is causal; None: it sees whole clips."""
        return self._config if self._config and role in self._config.roles else None

    def chunks(self, role: str, frames: int) -> tuple[Chunk, ...]:
        """Divide a video of ``frames``; see ``CausalRollout.chunks``."""
        self._bundle.require_roles([role])
        config = self.config_of(role)
        return (Chunk(0, frames),) if config is None else config.chunks(frames)

    def clear(self, role: str, stream: str | None = None) -> None:
        """Forget what ``role`` cached: one stream of it, or all."""
        self._bundle.require_roles([role])
        self._caches.clear(role, stream)

    def inputs(self, role: str, stream: str) -> tuple[StoredChunk, ...]:
        """Return the chunks of a stream that are kept, which each expert has alike."""
        return next((past.stored for past in self._caches.stored(role, stream).values()), ())

    def state(self, role: str, stream: str) -> dict[str, object]:
        """See ``CausalRollout.past_state``; by expert."""
        return {
            place.module: {
                "shape": list(past.caller.shape),
                "next_frame": past.next_frame,
                "chunks": [
                    {
                        "first": stored.chunk.first, "x_t": stored.x_t, "t": stored.t,
                        "layers": [list(pair) for pair in stored.layers],
                    }
                    for stored in past.stored
                ],
            }
            for place, past in self._caches.stored(role, stream).items()
            if not place.negative
        }  # fmt: skip

    def load(
        self, role: str, stream: str, state: Mapping[str, Any], tensors: tuple[Tensor, ...]
    ) -> None:
        """See ``CausalRollout.load_past``.

        Args:
            tensors: of the condition.
        """
        self.clear(role, stream)
        for module, past in state.items():
            stored = tuple(
                StoredChunk(
                    Chunk(one["first"], one["x_t"].shape[2]),
                    one["x_t"],
                    one["t"],
                    tuple((key, value) for key, value in one["layers"]),
                )
                for one in past["chunks"]
            )
            batch, height, width = past["shape"]
            caller = Caller.of(stored[0].x_t, tensors)
            assert caller.shape == (batch, height, width)
            place = Place(role=role, module=module, negative=False, stream=stream)
            self._caches.keep(
                place, Past(caller=caller, stored=stored, next_frame=past["next_frame"])
            )

    def cached_bytes(self, role: str) -> int:
        """Count the bytes that the caches of ``role`` hold."""
        return sum(size for place, size in self._caches.sizes().items() if place.role == role)

    def prepare(
        self,
        place: Place,
        x_t: Tensor,
        t: Tensor,
        cond: tuple[Tensor, ...],
        caches: ChunkCall | CleanPast | None,
        transformer: WanTransformer3DModel,
    ) -> PreparedCall:
        """Turn a call on ``x_t`` [B, C, T, H, W] at ``t`` [B] or [B, T] into one of the model.

        Args:
            place: its ``stream`` is that of ``caches``.
            cond: the condition's own tensors, before any copy: they say whose past it is.

        Raises:
            CapabilityError: ``caches`` for a role that is not causal.
            ContractError: a chunk that does not follow what is cached, or more frames than the
                model has positions.
        """
        config = self.config_of(place.role)
        if config is None:
            if caches is not None:
                raise _not_causal(place.role, caches)
            return PreparedCall(x_t, t)
        if caches is None:
            prepared = PreparedCall(x_t, t, CausalCall(layout.whole_clip(config, x_t.shape[2])))
        elif isinstance(caches, CleanPast):
            prepared = _beside_clean(x_t, t, caches, config)
        else:
            layers = len(transformer.blocks)
            prepared = self._after_past(place, x_t, t, cond, caches, config, layers)
        _check_positions(prepared, transformer)
        return prepared

    def _after_past(
        self,
        place: Place,
        x_t: Tensor,
        t: Tensor,
        cond: tuple[Tensor, ...],
        request: ChunkCall,
        config: CausalConfig,
        layer_count: int,
    ) -> PreparedCall:
        chunk = _checked_chunk(config, request.first_frame, x_t.shape[2])
        past = self._caches.past(place, chunk, Caller.of(x_t, cond), after_gap=request.after_gap)
        if config.sink_positions == "kept":
            call = CausalCall(layout.one_chunk_in_video(past.spans, chunk), past)
        else:
            call = CausalCall(layout.one_chunk(past.frames, chunk.frames), past)
        frames = (range(chunk.first, chunk.stop),)
        if not request.store:
            return PreparedCall(x_t, t, call, frames=frames)
        call.kept = {}

        def keep(v: Tensor) -> Tensor:
            # None from here on: when checkpointing recomputes this forward, it stores nothing.
            kept, call.kept = call.kept or {}, None
            layers = tuple(kept[i] for i in range(layer_count))
            stored = StoredChunk(chunk, x_t.detach(), t, layers)
            self._caches.keep(place, past.with_chunk(stored, config))
            return v

        return PreparedCall(x_t, t, call, keep, frames=frames)


# -- one call -------------------------------------------------------------------------------------


@define(eq=False)
class CausalCall:
    """What the self-attention of one model call sees.

    Attributes:
        layout: which frames each chunk attends to, and at which positions.
        past: keys and values of earlier chunks; never changes.
        kept: where this call's own keys and values go, by layer; None: they are not kept.
    """

    layout: Layout
    past: Past | None = None
    kept: dict[int, KeysAndValues] | None = None


@frozen(eq=False)
class BlockContext:
    """What each block gets in the place of rotary tables: the call, and the tables themselves.

    Attributes:
        table: cosines and sines by position and token of a frame, [positions, tokens, 1, width].
    """

    call: CausalCall
    table: tuple[Tensor, Tensor]

    @property
    def tokens(self) -> int:
        """Tokens of one frame."""
        return self.table[0].shape[1]

    def rows(self, positions: Sequence[range], shift: int = 0) -> tuple[Tensor, Tensor]:
        """Take cosines and sines [1, tokens of all positions, 1, width] out of the table."""
        cos, sin = (
            torch.cat([t[p.start + shift : p.stop + shift] for p in positions])
            if len(positions) > 1
            else t[positions[0].start + shift : positions[0].stop + shift]
            for t in self.table
        )
        return cos.flatten(0, 1)[None], sin.flatten(0, 1)[None]


@frozen(eq=False)
class PreparedCall:
    """A model call as the transformer receives it.

    Attributes:
        x_t, t: what the model reads: twice as many frames beside a clean past.
        call: goes to the transformer as an argument (``arguments``); None: not a causal role.
        finish: to be called with the model's output; keeps what shall be past, and returns the
            output for the frames asked for.
        frames: which frames of the video those of ``x_t`` are.
    """

    x_t: Tensor
    t: Tensor
    call: CausalCall | None = None
    finish: Callable[[Tensor], Tensor] = lambda v: v
    frames: tuple[range, ...] = field(
        default=Factory(lambda call: (range(call.x_t.shape[2]),), takes_self=True), kw_only=True
    )

    @property
    def arguments(self) -> dict[str, CausalCall]:
        """Keyword arguments of the transformer beside the stock ones."""
        return {} if self.call is None else {_ARGUMENT: self.call}


def token_times(transformer: WanTransformer3DModel, x_t: Tensor, t: Tensor) -> Tensor:
    """Return t [B] as it is, and [B, T] as one time a token, [B, T * tokens of a frame].

    Raises:
        ContractError: [B, T], but the model folds several frames into a token.
    """
    if t.dim() == 1:
        return t
    frames, height, width = transformer.config["patch_size"]
    if frames != 1:
        raise ContractError(
            f"t is [B, T], but the model folds {frames} latent frames into one token, which can "
            "have one time only. Give t as [B]"
        )
    return t.repeat_interleave((x_t.shape[3] // height) * (x_t.shape[4] // width), dim=1)


def _beside_clean(x_t: Tensor, t: Tensor, clean: CleanPast, config: CausalConfig) -> PreparedCall:
    if clean.latents.shape != x_t.shape:
        raise ContractError(
            f"the clean past is {list(clean.latents.shape)} beside {list(x_t.shape)}; it must be "
            "the same clips, as each chunk's past is cut from it"
        )
    batch, _, frames, _, _ = x_t.shape
    clean_t = torch.zeros_like(t) if clean.t is None else clean.t.to(t)
    times = [one if one.dim() == 2 else one[:, None].expand(batch, frames) for one in (clean_t, t)]
    # One call of twice the length: the clean clip, then the noisy one, whose chunks see the clean
    # chunks before them. Only the noisy half of the output is a prediction.
    return PreparedCall(
        torch.cat([clean.latents.detach().to(x_t), x_t], dim=2),
        torch.cat(times, dim=1),
        CausalCall(layout.clean_past(config, frames)),
        lambda v: v[:, :, frames:],
        frames=(range(frames), range(frames)),
    )


def _check_positions(prepared: PreparedCall, transformer: WanTransformer3DModel) -> None:
    has = transformer.config["rope_max_seq_len"]
    if prepared.call is not None and prepared.call.layout.longest > has:
        raise ContractError(
            f"frame {prepared.call.layout.longest - 1} needs a position beyond the model's {has} "
            "(rope_max_seq_len). Give CausalConfig window_frames, with sink_positions moving: "
            "positions are then those within the window"
        )


def _checked_chunk(config: CausalConfig, first_frame: int, frames: int) -> Chunk:
    full = config.chunk_at(first_frame)
    if full is None or not 1 <= frames <= full.frames:
        lead = "0, 1, 1 + " if config.first_frame_alone else "0, "
        raise ContractError(
            f"{frames} frames from frame {first_frame} are no chunk: chunks begin at {lead}"
            f"{config.chunk_frames}k and hold {config.chunk_frames} frames (the first "
            f"{config.chunks(config.chunk_frames + 1)[0].frames}, a video's last perhaps fewer). "
            "Take them from adapter.chunks(role, frames)"
        )
    return Chunk(first_frame, frames)


def _not_causal(role: str, caches: ChunkCall | CleanPast) -> CapabilityError:
    return CapabilityError(
        f"forward of role {role!r} was given {type(caches).__name__}, but this role sees whole "
        "clips. Name it in CausalConfig.roles, or call it without caches"
    )


# -- on the module --------------------------------------------------------------------------------


@define(eq=False)
class CausalSwitch:
    """Hooks that take a call's argument from the transformer and hand it to its blocks.

    Between these hooks, which run after each other within one call on one thread, the argument is
    kept under that thread: several threads may call the same transformer.
    """

    config: CausalConfig
    _calls: dict[int, CausalCall | None] = field(factory=dict, init=False)

    def take_argument(
        self, module: WanTransformer3DModel, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Take ``causal=`` out of the arguments; a pre-hook of the transformer."""
        rest = dict(kwargs)
        call = rest.pop(_ARGUMENT, None)
        assert call is None or isinstance(call, CausalCall)
        self._calls[threading.get_ident()] = call
        return args, rest

    def lengthen_tables(self, rope: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Have ``rope`` make tables for as many frames as this call has positions; a pre-hook.

        It reads nothing but the shape of its input. A call without an argument is one on a whole
        clip.
        """
        (x,) = args
        thread = threading.get_ident()
        call = self._calls.get(thread) or CausalCall(layout.whole_clip(self.config, x.shape[2]))
        self._calls[thread] = call
        return (x[:, :1, :1].expand(-1, -1, call.layout.longest, -1, -1),)

    def replace_tables(
        self, rope: nn.Module, args: tuple[Tensor], tables: tuple[Tensor, Tensor]
    ) -> BlockContext:
        """Give the blocks a ``BlockContext`` in the place of the tables; a hook of ``rope``."""
        call = self._calls.pop(threading.get_ident())
        assert call is not None  # lengthen_tables put one there
        cos, sin = (t.view(call.layout.longest, -1, 1, t.shape[-1]) for t in tables)
        return BlockContext(call, (cos, sin))


@define(eq=False)
class CausalAttnProcessor:
    """Self-attention of one block, each group of queries over the keys that it sees.

    Projections, norms and the rotation are those of diffusers' ``WanAttnProcessor``, and so is the
    name of the attribute by which ``set_attention_backend`` chooses the kernel.

    Attributes:
        layer: index of the block.
    """

    layer: int
    switch: CausalSwitch
    _attention_backend: AttentionBackendName | None = field(default=None, alias="backend")

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: object = None,
    ) -> Tensor:
        """Attend: [B, tokens, width] to the same shape."""
        if not isinstance(rotary_emb, BlockContext):
            raise ContractError(
                f"block {self.layer} of a causal transformer got {type(rotary_emb).__name__} where "
                "the hook on its rope gives a BlockContext; without the hook it does not know "
                "what to attend to. Call the whole transformer, and keep its hooks"
            )
        context, call = rotary_emb, rotary_emb.call
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        # Before the rotation: a chunk's position changes as the window moves on, its keys do not.
        if call.kept is not None:
            call.kept[self.layer] = (key.detach(), value.detach())
        if call.past is not None and call.past.stored:
            keys, values = zip(*call.past.layer(self.layer), strict=True)
            key, value = torch.cat([*keys, key], dim=1), torch.cat([*values, value], dim=1)
        kernel = self._attention_backend
        out = _attended(query, key, value, context, kernel).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: BlockContext,
    kernel: AttentionBackendName | None,
) -> Tensor:
    """Attend group by group; all [B, tokens, heads, width], keys not rotated yet.

    Queries of one chunk see the same keys, so each group is one dense product over those keys, for
    which fused kernels exist; a mask over all keys would rule them out (see ``layout``).
    """
    attention, tokens = context.call.layout, context.tokens
    cos, sin = context.rows(attention.positions)
    rotated = _rotated(key, cos, sin)
    # Keys of the cached past come first; queries are of this call's own frames alone.
    own = attention.past * tokens
    query = _rotated(query, cos[:, own:], sin[:, own:])

    def key_span(span: Span) -> Tensor:
        part = slice(span.start * tokens, span.stop * tokens)
        if not span.shift:
            return rotated[:, part]
        # Only sinks are shifted, to stand right before the window, and a sink's position without
        # the shift is its index. It is rotated anew, from the key before rotation.
        shifted = context.rows([range(span.start, span.stop)], span.shift)
        return _rotated(key[:, part], *shifted)

    def attend(group: Group) -> Tensor:
        return dispatch_attention_fn(
            query[:, group.start * tokens : group.stop * tokens],
            _cat([key_span(span) for span in group.keys]),
            _cat([value[:, s.start * tokens : s.stop * tokens] for s in group.keys]),
            backend=kernel,
        )

    return _cat([attend(group) for group in attention.groups])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs (RoPE, Su et al. 2021, eq. 34), as diffusers' processor does.

    The tables hold each cosine and sine twice, once for either of a pair, so every second is read.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _prepare(name: str, module: nn.Module, config: CausalConfig | None) -> None:
    """Make a role's module causal, or check that it is not."""
    if not isinstance(module, WanTransformer3DModel):
        if config is None:
            return
        raise WeightsError(
            f"{name} is a {type(module).__name__}; only Wan's transformers can be causal. Take the "
            "role out of CausalConfig.roles"
        )
    transformer, switch = module, _switch_of(module)
    if config is None:
        if switch is not None:
            raise ContractError(
                f"{name} is of a role that is not causal, but an earlier adapter made it causal, "
                "and it stays so. Load the bundle again"
            )
        return
    for problem in causal_problems(config, dict(transformer.config)):
        raise WeightsError(f"{name}: {problem}")
    if switch is not None:
        switch.config = config
        return
    switch = CausalSwitch(config)
    transformer.register_forward_pre_hook(switch.take_argument, with_kwargs=True)
    transformer.rope.register_forward_pre_hook(switch.lengthen_tables)
    transformer.rope.register_forward_hook(switch.replace_tables)
    for layer, attention in enumerate(_self_attentions(transformer)):
        kernel = attention.processor._attention_backend  # that of the role, if it has one
        attention.set_processor(CausalAttnProcessor(layer, switch, kernel))


def _switch_of(transformer: WanTransformer3DModel) -> CausalSwitch | None:
    processor = _self_attentions(transformer)[0].processor
    return processor.switch if isinstance(processor, CausalAttnProcessor) else None


def _self_attentions(transformer: WanTransformer3DModel) -> list[Any]:
    return [cast(Any, block).attn1 for block in transformer.blocks]
