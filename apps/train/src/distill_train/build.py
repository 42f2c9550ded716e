"""From a checked run file to parts that run: the only place that knows all of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import torch
from attrs import evolve, frozen
from distill_checkpoint import (
    CheckpointManager,
    ExportCallback,
    read_start_weights,
)
from distill_conditioning import (
    CachedConditioning,
    DataConfig,
    DataPart,
    LatentDataset,
    LatentLoader,
    SampleShape,
)
from distill_protocols import (
    Batch,
    Callback,
    Condition,
    DistillAdapter,
    Exporter,
    ModelBundle,
    RandomStreams,
    RankGroup,
    RoleHandle,
    RunDescription,
    RunParts,
    TrainableMethod,
    WeightSource,
)
from distill_runfile import RunConfig, horizon, horizons
from distill_runtime import readable_bytes
from distill_trainer import (
    DistillTrainer,
    Distribution,
    LossEvaluator,
    ValidationCallback,
    build_optimizers,
    build_trackers,
)

_log = logging.getLogger(__name__)


@frozen(eq=False, kw_only=True)
class Run:
    """Everything that a run is made of."""

    trainer: DistillTrainer
    method: TrainableMethod
    loader: LatentLoader
    bundle: ModelBundle
    adapter: DistillAdapter


def build(
    config: RunConfig,
    *,
    distribution: Distribution,
    again: Collection[str] = (),
    run_file: str = "",
) -> Run:
    """Weights, optimizers, adapter, conditioning, method, loader, callbacks, trainer: in order.

    All ranks build together: each takes its part of sharded roles and its samples of every batch.
    What one cannot read, none goes on without: the others would wait for it in what comes next.

    Args:
        again: as in ``run``. What is logged is there already, so there are no trackers then.
        run_file: its text, for trackers.
    """
    ranks, device = distribution.ranks, distribution.device
    output_dir = Path(config.training.output_dir)
    bundle = config.family_plugin.load(
        [role.spec for role in config.roles.values()],
        config.pipeline,
        device=device,
        seed=config.training.seed,
        weights=ranks.run_each(lambda: _start_weights(config, output_dir)),
        shard=lambda role: _take_up(role, distribution),
    )
    _attach_optimizers(config, bundle)
    adapter = ranks.run_each(
        lambda: config.family_plugin.adapter(bundle, config.pipeline, source=config.source)
    )
    dataset = ranks.run_each(lambda: _open_dataset(config, config.data, adapter))
    conditioning = CachedConditioning(
        config.conditioning,
        encoder=adapter,
        dataset=dataset,
        output_dir=output_dir,
        device=device,
        ranks=ranks,
    )
    streams = RandomStreams(
        config.training.seed, rank=ranks.rank, world_size=ranks.size, device=device
    )
    method = config.method_plugin.build(
        config.method, bundle=bundle, adapter=adapter, conditioning=conditioning, streams=streams
    )
    loader = LatentLoader(
        dataset,
        batch_size=config.training.micro_batch(ranks.size),
        seed=config.training.seed,
        dropout=config.conditioning.dropout,
        negative=_negative(config, conditioning),
        group_size=config.training.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.size,
        device=device,
        part=_part(config, is_held_out=False),
    )
    losses = ranks.run_each(lambda: _loss_evaluator(config, adapter, ranks, device))
    parts = RunParts(
        method=method,
        adapter=adapter,
        conditioning=conditioning,
        exporter=_exporter(config),
        output_dir=output_dir,
        method_config=config.method,
        examples=lambda count: _examples(dataset, count, config.training.seed, device),
        micro_batch=config.training.micro_batch(ranks.size),
    )
    trainer = DistillTrainer(
        config.training,
        callbacks=_callbacks(config, parts, losses),
        trackers=ranks.run_each(
            lambda: (
                build_trackers(config.training.trackers, output_dir)
                if ranks.is_first and not again
                else ()
            )
        ),
        checkpointer=CheckpointManager(config.checkpoint, output_dir, config.resolved),
        streams=streams,
        distribution=distribution,
        description=RunDescription(
            name=output_dir.name, run_file=run_file, settings=config.resolved
        ),
        again=again,
    )
    return Run(trainer=trainer, method=method, loader=loader, bundle=bundle, adapter=adapter)


def _open_dataset(config: RunConfig, data: DataConfig, adapter: DistillAdapter) -> LatentDataset:
    clips = tuple(dict.fromkeys([adapter.latent_shape, *config.latent_shapes]))
    # A method that makes its own clips is given no others, and needs no data with all their parts.
    parts: tuple[str, ...] = ()
    if adapter.parts is not None and config.method.needs_latents:
        parts = tuple(adapter.parts.part_shapes(adapter.latent_shape))
    return LatentDataset(
        data,
        shapes=[SampleShape(latents=clip, conditions={}) for clip in clips],
        clips=clips,
        parts=parts,
        times=config.method.trajectory_times,
    )


def _part(config: RunConfig, *, is_held_out: bool) -> DataPart | None:
    """Return which of the samples are trained on, or held out; None: there is no such division."""
    share = None if config.validation is None else config.validation.share
    return None if share is None else DataPart(share=share, is_held_out=is_held_out)


def _loss_evaluator(
    config: RunConfig, adapter: DistillAdapter, ranks: RankGroup, device: torch.device
) -> LossEvaluator | None:
    validation = config.validation
    if validation is None or not validation.measures_losses:
        return None
    trained_on = evolve(config.data, workers=0)  # a few batches at a time, and nothing between
    held_out = trained_on
    if validation.data is not None:
        held_out = evolve(trained_on, path=validation.data.path, sets=())

    def loader(data: DataConfig, *, is_held_out: bool) -> LatentLoader:
        # Without dropout: a caption that is dropped at random has another loss.
        micro_batch = config.training.micro_batch(ranks.size)
        return LatentLoader(
            _open_dataset(config, data, adapter),
            batch_size=micro_batch,
            seed=validation.seed,
            group_size=micro_batch * ranks.size,
            rank=ranks.rank,
            world_size=ranks.size,
            device=device,
            part=_part(config, is_held_out=is_held_out),
        )

    return LossEvaluator(
        loader(held_out, is_held_out=True),
        loader(trained_on, is_held_out=False),
        batches=validation.batches,
        seed=validation.seed,
    )


def _examples(dataset: LatentDataset, count: int, seed: int, device: torch.device) -> Batch:
    """Return the samples that a run of one process begins with; see ``RunParts``."""
    loader = LatentLoader(dataset, batch_size=count, seed=seed, device=device)
    return next(iter(loader))


def _take_up(role: RoleHandle, distribution: Distribution) -> None:
    """Log which role is loaded next, with its size, and shard it; nothing of it is read yet."""
    parameters = [p for module in role.modules.values() for p in module.parameters()]
    _log.info(
        "  %s: %s parameters (%s), %s, %s",
        role.name,
        _readable_count(sum(p.numel() for p in parameters)),
        readable_bytes(sum(p.numel() * p.element_size() for p in parameters)),
        "trained" if role.trainable else "frozen",
        role.precision,
    )
    distribution.shard(role)


def _readable_count(count: int) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _identities(config: RunConfig) -> dict[str, object]:
    """Return, by role, what its weights and clips are known by: what the run file states."""
    models = cast("Mapping[str, object]", config.resolved["models"])
    shared = (config.recipe.family, config.resolved["pipeline_config"])
    return {name: [*shared, models.get(name)] for name in config.roles}


def _start_weights(config: RunConfig, output_dir: Path) -> dict[str, Mapping[str, WeightSource]]:
    """Open, by role, the weights that it starts with instead of those of its path."""
    sources: dict[str, Mapping[str, WeightSource]] = {}
    for name, role in config.roles.items():
        start = role.init_from
        if start is None or role.comes_from_checkpoint(config.checkpoint, output_dir):
            continue
        _log.info("%s starts from %s%s", name, start.path, " (EMA)" if start.ema else "")
        sources[name] = read_start_weights(
            start.path,
            start.role or name,
            ema=start.ema,
            family=config.family_plugin,
            spec=role.spec,
        )
    return sources


def _attach_optimizers(config: RunConfig, bundle: ModelBundle) -> None:
    scaled = any(r.trainable and r.precision == "fp16" for r in bundle.roles.values())
    for name, role in config.roles.items():
        if role.optimizer is not None:

            def steps(after: int, name: str = name) -> int | dict[str, int]:
                return horizons(config, name, after=after) or horizon(config, name, after=after)

            build_optimizers(bundle[name], role.optimizer, horizon=steps, scaled=scaled)


def _exporter(config: RunConfig) -> Exporter | None:
    family = config.family_plugin
    if not family.export_formats():
        return None
    return family.exporter(config.pipeline, source=config.source)


def _negative(config: RunConfig, conditioning: CachedConditioning) -> Condition | None:
    return conditioning.negatives() if config.conditioning.drops else None


def _callbacks(config: RunConfig, parts: RunParts, losses: LossEvaluator | None) -> list[Callback]:
    """Build the callbacks in the order in which they are called.

    Export comes first, so that the result of a run is safe before a report may fail. What measures,
    then validation, come late, as they read averages that have moved; what shows their results is
    the last.
    """
    callbacks: list[Callback] = []
    if config.checkpoint.export and parts.exporter is not None:
        exports = config.checkpoint.export
        specs = {name: role.spec for name, role in config.roles.items()}
        callbacks.append(
            ExportCallback(
                exports,
                parts.exporter,
                specs,
                parts.output_dir,
                timeout=config.checkpoint.timeout_seconds,
            )
        )
    plugins = config.callback_plugins
    in_order = sorted(
        config.callbacks.items(), key=lambda item: bool(plugins[item[0]].metrics(item[1]))
    )
    callbacks += [
        plugins[name].build(value, parts)
        for name, value in in_order
        if not plugins[name].shows_results
    ]
    if config.validation is not None:
        callbacks.append(
            ValidationCallback(
                config.validation,
                parts.conditioning,
                identities=_identities(config),
                losses=losses,
                capabilities=parts.adapter.capabilities,
            )
        )
    callbacks += [
        plugins[name].build(value, parts) for name, value in in_order if plugins[name].shows_results
    ]
    return callbacks
