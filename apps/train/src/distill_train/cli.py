"""The command line: ``--config run.yaml`` and little else.

torch is imported only once the file is found right: ``--help`` and a wrong file answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill_protocols import ConfigError
from distill_runfile import cli
from distill_runfile.cli import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED
from distill_runtime import counted

if TYPE_CHECKING:
    from distill_runfile import RunConfig, Stage

_log = logging.getLogger(__name__)

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?(e\d+)?)\s*(?P<unit>[kmgt]i?b|b)?", flags=re.IGNORECASE)
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000 ** (i + 1) for i, letter in enumerate("kmgt")},
    **{f"{letter}ib": 1024 ** (i + 1) for i, letter in enumerate("kmgt")},
}

_EPILOG = """\
exit status: 0 finished, 1 failed, 2 the run file is wrong, 3 with --dry-run: it is right, but data
or weights are not here yet (the last line states which), 74 a file could not be written or read (a
full disk ...), 75 stopped on request with a checkpoint saved (start the same command again with
checkpoint.resume: latest), 130 interrupted.

several processes: uv run torchrun --nproc-per-node 8 apps/train --config RUN.yaml
(see training.distributed and docs/processes.md). Under torchrun --max-restarts a stop on request
ends with 0, as any other status would start the run again.
"""


@cli.outlive_readers()
def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.plugins:
        return cli.list_plugins()
    if args.config is None:
        _parser().error("--config RUN.yaml is needed (see configs/ for examples)")
    if not args.dry_run and (args.world_size or args.device_memory):
        _parser().error("--world-size and --device-memory go with --dry-run: they are of a plan")
    if args.dry_run and args.again:
        _parser().error("--again makes results, and --dry-run starts nothing: leave one out")
    if args.chain and (args.again or args.models_json):
        _parser().error("--chain is of several run files, and --again and --models_json of one")
    if not args.dry_run and _is_first() and sys.stderr.isatty():
        # At once: a person should see that something happens.
        cli.say(f"reading {args.config}", sys.stderr)
    try:
        from distill_runfile.read import read_config

        if args.chain:
            return _chain(args)
        config = read_config(
            args.config, args.models_json, planning=args.dry_run, world_size=args.world_size
        )
    except ConfigError as error:
        return cli.print_problems(error, "nothing was started")
    except KeyboardInterrupt:
        print("interrupted: nothing was started", file=sys.stderr)
        return EXIT_INTERRUPTED
    unknown = sorted(set(args.again) - set(results_of(config)))
    if unknown:
        _parser().error(
            f"--again {' '.join(unknown)}: this run has no such result (it has: "
            f"{', '.join(results_of(config)) or 'none'})"
        )
    return cli.run_command(
        lambda: (
            cli.print_needs(_print_plan(config, args))
            if args.dry_run
            else _status_for_torchrun(_train(config, again=args.again, run_file=args.config))
        ),
        interrupted=lambda: "interrupted: nothing was saved since the last checkpoint",
    )


def results_of(config: RunConfig) -> tuple[str, ...]:
    """Name what a run makes at its end, for ``--again``: exports, validation, callbacks."""
    export = ("export",) if config.checkpoint.export else ()
    validation = ("validation",) if config.validation is not None else ()
    return (*export, *validation, *config.callbacks)


def _print_plan(config: RunConfig, args: argparse.Namespace) -> Sequence[str]:
    """Print what a run would be; returns what it still needs."""
    with _collector_off():
        from distill_runfile import plan_run, world_size_of

        world_size = args.world_size or world_size_of(os.environ)
        plan = plan_run(config, world_size=world_size, device_memory=args.device_memory)
        cli.say(plan.text)
    return plan.needs


def _chain(args: argparse.Namespace) -> int:
    """Plan or run the run of ``--config`` after those that it starts from.

    Raises:
        ConfigError: a file of the chain is wrong; found before the first run starts.
    """
    from distill_runfile import find_chain
    from distill_runfile.read import read_config

    stages = find_chain(args.config)
    made: set[str] = set()
    plans: list[RunConfig] = []
    for stage in stages:
        made |= set(map(str, stage.starts.values()))
        plan = read_config(stage.file, planning=True, world_size=args.world_size, made_before=made)
        plans.append(plan)
    if args.dry_run:
        return cli.run_command(
            lambda: _print_plans(stages, plans, args),
            interrupted=lambda: "interrupted: nothing was started",
        )
    if needs := [
        f"{stage.file}: {part} is not there"
        for stage, plan in zip(stages, plans, strict=True)
        for part in plan.missing
    ]:
        raise ConfigError(needs)
    from distill_train.chain import Chain

    cli.show_logs()
    chain = Chain(
        stages=stages,
        read=read_config,
        run=lambda config, file: _train(config, again=(), run_file=file),
        is_first=_is_first(),
    )
    return cli.run_command(
        lambda: _status_for_torchrun(chain.run_all()),
        interrupted=lambda: "interrupted: nothing was saved since the last checkpoint",
    )


def _print_plans(
    stages: Sequence[Stage], plans: Sequence[RunConfig], args: argparse.Namespace
) -> int:
    needs: list[str] = []
    for number, (stage, plan) in enumerate(zip(stages, plans, strict=True), start=1):
        cli.say(f"stage {number} of {len(stages)}: {stage.file}\n")
        needs += _print_plan(plan, args)
        cli.say("")
    return cli.print_needs(list(dict.fromkeys(needs)))


def _train(config: RunConfig, *, again: Collection[str], run_file: Path) -> int:
    from distill_checkpoint import finished_iteration

    output_dir, steps = Path(config.training.output_dir), config.training.max_train_steps
    is_finished = finished_iteration(output_dir) == steps and config.checkpoint.resume != "none"
    if is_finished and not again:
        if _is_first():
            cli.say(
                f"finished already: {output_dir} holds iteration {steps:,} of {steps:,}, and "
                "nothing was touched. A larger max_train_steps goes on; --again NAME ... makes "
                f"results anew ({', '.join(results_of(config)) or 'this run has none'})"
            )
        return EXIT_OK
    cli.show_logs()
    _log.info(
        "%s on %s: %d iterations of %s, seed %d; loading libraries and models ...",
        config.recipe.method,
        config.recipe.family,
        steps,
        counted(config.training.global_batch_size, "sample"),
        config.training.seed,
    )
    from distill_train.run import run

    result = run(config, again=again, run_file=run_file)
    return EXIT_OK if result.stop_reason is None else EXIT_STOPPED


def _status_for_torchrun(status: int) -> int:
    """Return the exit status of this process: of a run that stopped on request 0 where torchrun
    starts processes again.

    It does so with any status but 0, as often as its ``--max-restarts`` allows, and a run that was
    asked to stop shall stay stopped.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return EXIT_OK if status == EXIT_STOPPED and restarts > 0 else status


def _is_first() -> bool:
    """Return whether this is the first process of the run, before they are brought together."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Do without garbage collection, which takes a tenth of the time of the heavy imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "train",
        "Distil or finetune a video diffusion model, as described in one YAML file.",
        _EPILOG,
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "--chain",
        action="store_true",
        help="run before it the runs that it starts from (models.<role>.init_from), as far as "
        "files in its folder make them; what is finished is left, what was stopped goes on",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the file, print the plan (roles, memory, updates, data), start nothing",
    )
    parser.add_argument(
        "--world-size",
        type=cli.positive_integer("processes"),
        metavar="N",
        help="with --dry-run: plan for so many processes (left out: those that torchrun started)",
    )
    parser.add_argument(
        "--device-memory",
        type=_bytes,
        metavar="SIZE",
        help="with --dry-run: say whether the run fits, and what would help (80GB, 24GiB, 40e9)",
    )
    parser.add_argument(
        "--models_json",
        type=Path,
        metavar="MODELS.json",
        help="JSON of role -> keys, which override those under models: (for generated runs)",
    )
    parser.add_argument(
        "--again",
        nargs="+",
        default=(),
        metavar="NAME",
        help="of a finished run: redo these results from its last checkpoint (export, "
        "validation, report or another callback), and nothing else",
    )
    parser.add_argument(
        "--plugins",
        action="store_true",
        help="list the installed families, methods, callbacks and trackers",
    )
    return parser


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    size = float(match["number"]) * _UNITS[(match["unit"] or "").lower()] if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a size in bytes, such as 80GB (10^9), 24GiB (2^30) or 40e9"
        )
    return int(size)
