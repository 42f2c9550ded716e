"""Causal roles: chunks, key/value caches, teacher forcing, streams."""

from __future__ import annotations

import torch
from distill_protocols import ChunkCall, CleanPast, ContractError, DistillError, SamplerSpec
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill_conformance.adapter_case import ROWS, AdapterCase, normal, row_generators
from distill_conformance.adapter_checks.calls import FEW
from distill_conformance.failures import ConformanceError, must_raise, require, require_equal

SPEC = SamplerSpec(steps=2, timesteps=(1000.0, 500.0), stochastic=True)


def check_chunks(case: AdapterCase) -> None:
    """Chunks tile a video of any length, in order; a role that is not causal has one.

    Otherwise frames are made twice or never.
    """
    causal = case.causal

    @FEW
    @given(frames=st.integers(1, 40))
    def check(frames: int) -> None:
        for role in case.model_roles:
            chunks = causal.chunks(role, frames)
            require(
                [c.first for c in chunks] == [0, *(c.stop for c in chunks[:-1])]
                and chunks[-1].stop == frames
                and all(c.frames > 0 for c in chunks),
                f"the chunks of {role!r} do not tile {frames} frames: {chunks}",
            )
            if role not in case.causal_roles:
                require(len(chunks) == 1, f"role {role!r} is not causal and has {chunks}")

    check()
    for role in case.model_roles:
        own = causal.chunks(role)
        require(
            own == causal.chunks(role, case.adapter.latent_shape[1]),
            f"chunks({role!r}) is not that of a clip of the run",
        )


def check_causality(case: AdapterCase) -> None:
    """A chunk does not see later ones.

    Otherwise a causal student is trained with frames that it does not have when it samples.
    """
    causal = case.causal
    cond, x_t = case.condition(), case.noise()
    for role in case.causal_roles:
        last = causal.chunks(role)[-1]
        if last.first == 0:
            continue
        changed = x_t.clone()
        changed[:, :, last.span] = normal(*changed[:, :, last.span].shape, seed=7)
        t = case.times(role)[0]
        with torch.no_grad():
            v = case.adapter.forward(role, x_t, t, cond)
            other = case.adapter.forward(role, changed, t, cond)
        case.require_close(
            other[:, :, : last.first], v[:, :, : last.first], f"frames of {role!r} before a change"
        )


def check_cached_calls(case: AdapterCase) -> None:
    """Chunk after chunk with caches gives what one call on the whole clip gives.

    Training calls the clip at once, sampling chunk by chunk.
    """
    cond, x_t = case.condition(), case.noise()
    for role in case.causal_roles:
        for t in case.times(role):
            with torch.no_grad():
                whole = case.adapter.forward(role, x_t, t, cond)
            cached = _by_chunks(case, role, x_t, t, x_t, t)
            case.require_close(cached, whole, f"{role!r} chunk by chunk and at once")
    case.causal  # noqa: B018 - not applicable without causal roles


def check_teacher_forcing(case: AdapterCase) -> None:
    """A call with ``CleanPast`` is a rollout whose past is that clean clip.

    Teacher forcing would otherwise train another model than the one that is sampled.
    """
    case.need("supports_teacher_forcing")
    cond, x_t, clean = case.condition(), case.noise(), case.noise(seed=2)
    case.causal  # noqa: B018 - not applicable without causal roles
    for role in case.causal_roles:
        for t in case.times(role):
            with torch.no_grad():
                forced = case.adapter.forward(role, x_t, t, cond, caches=CleanPast(latents=clean))
            zero = torch.zeros(ROWS)
            cached = _by_chunks(case, role, x_t, t, clean, zero)
            case.require_close(forced, cached, f"teacher forcing of {role!r} and cached chunks")


def check_cache_rules(case: AdapterCase) -> None:
    """A chunk that does not follow what is cached raises, a call without ``store`` changes nothing,
    streams do not disturb each other, and ``clear_caches`` forgets.

    Otherwise a clip continues another one.
    """
    causal, cond = case.causal, case.condition()
    for role in case.causal_roles:
        chunks = causal.chunks(role, 2 * case.adapter.latent_shape[1])
        first, second = chunks[0], chunks[1]
        x = normal(ROWS, *_chunk_shape(case, first.frames))
        y = normal(ROWS, *_chunk_shape(case, second.frames), seed=1)
        t = case.times(role)[-1]

        @torch.no_grad()
        def call(
            latents: Tensor,
            at: int,
            stream: str,
            store: bool = False,
            role: str = role,
            t: Tensor = t,
        ) -> Tensor:
            chunk = ChunkCall(first_frame=at, store=store, stream=stream)
            return case.adapter.forward(role, latents, t, cond, caches=chunk)

        causal.clear_caches(role)
        try:
            with must_raise(ContractError, f"a chunk of {role!r} after nothing"):
                call(y, second.first, "a")
            start = call(x, 0, "a")
            try:
                again = call(x, 0, "a", store=True)
            except ContractError as error:
                raise ConformanceError("a call without store changes the past") from error
            require_equal(again, start, "a first chunk called twice")
            after = call(y, second.first, "a")
            require_equal(call(y, second.first, "a"), after, "a chunk called twice without store")
            with must_raise(ContractError, f"a chunk of {role!r} whose place is past already"):
                call(x, 0, "a")
            call(y, 0, "b", store=True) if first.frames == second.frames else None
            require_equal(call(y, second.first, "a"), after, "a chunk beside another stream")
            causal.clear_caches(role, stream="a")
            with must_raise(ContractError, f"a chunk of {role!r} after clear_caches"):
                call(y, second.first, "a")
            require_equal(call(x, 0, "a"), start, "a first chunk after clear_caches")
        finally:
            causal.clear_caches(role)
    for role in case.model_roles:
        if role not in case.causal_roles:
            with must_raise(DistillError, f"a ChunkCall of {role!r}, which is not causal"):
                case.adapter.forward(
                    role, case.noise(), case.times(role)[0], cond, caches=ChunkCall(first_frame=0)
                )


def check_streams(case: AdapterCase) -> None:
    """``stream`` makes the chunks of ``sample``, one at a time, and two streams can be mixed;
    ``decode_stream`` makes the frames of ``decode``, and two of them can be mixed too."""
    causal, cond, noise = case.causal, case.condition(), case.noise()
    for role in case.causal_roles:
        chunks = causal.chunks(role)
        parts = [noise[:, :, chunk.span] for chunk in chunks]
        sample = case.adapter.sample(role, SPEC, noise, cond, generators=row_generators())
        one, two = (
            causal.stream(role, SPEC, iter(parts), cond, generators=row_generators())
            for _ in range(2)
        )
        made = []
        for part, again in zip(one, two, strict=True):
            require_equal(again, part, f"two streams of {role!r} side by side")
            made.append(part)
        case.require_close(torch.cat(made, dim=2), sample, f"a stream and a sample of {role!r}")
        if case.adapter.capabilities.supports_decode:
            both = (causal.decode_stream(iter(made)) for _ in range(2))
            frames = []
            for part, again in zip(*both, strict=True):
                require_equal(again, part, f"two decodings of {role!r} side by side")
                frames.append(part)
            whole = case.adapter.decode(torch.cat(made, dim=2))
            case.require_close(torch.cat(frames, dim=2), whole, f"decoding {role!r} by chunks")


@torch.no_grad()
def _by_chunks(
    case: AdapterCase, role: str, x_t: Tensor, t: Tensor, past: Tensor, past_t: Tensor
) -> Tensor:
    """v of ``x_t`` chunk by chunk, each after the chunks of ``past`` before it."""
    causal, cond, parts = case.causal, case.condition(), []
    causal.clear_caches(role)
    try:
        for chunk in causal.chunks(role):
            call = ChunkCall(first_frame=chunk.first)
            parts.append(case.adapter.forward(role, x_t[:, :, chunk.span], t, cond, caches=call))
            store = ChunkCall(first_frame=chunk.first, store=True)
            case.adapter.forward(role, past[:, :, chunk.span], past_t, cond, caches=store)
    finally:
        causal.clear_caches(role)
    return torch.cat(parts, dim=2)


def _chunk_shape(case: AdapterCase, frames: int) -> tuple[int, int, int, int]:
    channels, _, height, width = case.adapter.latent_shape
    return channels, frames, height, width
