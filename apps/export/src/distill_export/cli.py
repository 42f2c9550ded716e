"""The command line of the export. torch is imported only once the request is found right."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from distill_checkpoint import role_problems
from distill_protocols import CheckpointError, ConfigError, DistillError, ExportRequest, RoleSpec
from distill_runfile import ModelsConfig, cli, read_models
from distill_runfile.cli import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE

_EPILOG = """\
formats:
  diffusers   a pipeline folder with scheduler, VAE, text encoder and sampler_spec.json; sharded
  comfyui     one file under the model's original names, which ComfyUI and its nodes read
  lora        adapters for load_lora_weights: a LoRA role's own, or with --lora-rank the best ones
              of that rank for the difference between the role and its base
A LoRA role is merged into its base for the first two. Nothing else of the run is built or read.

exit status: 0 written (and verified, if asked), 1 failed, 2 the request is wrong, 74 the
disk failed, 130 interrupted.
"""


@cli.outlive_readers()
def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    cli.show_logs()
    try:
        checkpoint, held = cli.hold_newest_checkpoint(args.checkpoint, "--checkpoint")
        models = read_models(args.config or checkpoint / "config.json", args.role)
        role, request = _request(args, checkpoint, models)
    except ConfigError as error:
        cli.say(error, sys.stderr)
        if args.config is None:
            print(
                "The checkpoint's own run file cannot be used; name one with --config RUN.yaml "
                "(its recipe, models, pipeline_config and method_config are read).",
                file=sys.stderr,
            )
        return EXIT_USAGE
    except DistillError as error:
        cli.say(error, sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED

    def write() -> int:
        from distill_runtime import sigterm_as_interrupt

        from distill_export.run import export

        with held, sigterm_as_interrupt():
            # Files are named after the folder, and "." is no name.
            export(checkpoint, role, args.to.resolve(), request, models=models, verify=args.verify)
        return EXIT_OK

    return cli.run_command(
        write,
        interrupted=lambda: (
            f"interrupted: {args.to} is as it was, or, if its size was printed already, written "
            "whole but not verified"
        ),
    )


def _parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "export", "Write one role of a checkpoint where other tools can read it.", _EPILOG
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FOLDER",
        help="a checkpoint folder, or a run's output folder (its newest one is taken)")  # fmt: skip
    add("--role", required=True, help="which role, such as student")
    add("--to", type=Path, required=True, metavar="FOLDER", help="folder to write, whole or not")
    add("--ema", action="store_true", help="its averaged weights instead of the live ones")
    add("--format", default="diffusers", help="see below; a family may have others of its own")
    add("--precision", choices=("fp32", "bf16", "fp16"),
        help="of the written weights; default: as they are stored")  # fmt: skip
    add("--lora-rank", type=_rank, metavar="N", help="extract adapters of this rank")
    add("--max-shard-gb", type=_bytes, default=5 * 10**9, metavar="GB",
        help="largest weight file of a pipeline folder (default 5)")  # fmt: skip
    add("--config", type=Path, metavar="RUN.yaml",
        help="read models and pipeline here, not in the checkpoint's own run file")  # fmt: skip
    add("--verify", action="store_true",
        help="read the result with the reader that it is for; no key may be unmatched, and "
        "outputs must be equal")  # fmt: skip
    return parser


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a whole number from 1: it counts the columns of B; 32 to 128 is "
            "customary"
        )
    return int(text)


def _bytes(text: str) -> int:
    try:
        size = float(text) * 1e9
    except ValueError:
        size = math.nan
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of gigabytes above 0: a file holds a byte; 5 is customary"
        )
    return int(size)


def _request(
    args: argparse.Namespace, checkpoint: Path, models: ModelsConfig
) -> tuple[RoleSpec, ExportRequest]:
    problems = [
        f"--{'checkpoint' if p.path == ('path',) else '.'.join(p.path)}: {p.message}"
        for p in role_problems(checkpoint, args.role, ema=args.ema)
    ]
    sampler = models.method.student_sampler
    if sampler is None:
        problems.append(
            f"{models.recipe.method} states no way to sample its student, and an export without "
            "one leaves its users to guess steps and shift"
        )
    if args.role not in models.roles and not problems:
        problems.append(
            f"--role: {args.role!r} is in the checkpoint, but not among the models of the run "
            f"file ({', '.join(models.roles)}), so nothing describes how it is built. Name a run "
            "file that has it with --config"
        )
    if problems or sampler is None:
        raise CheckpointError("\n".join(problems))
    request = ExportRequest(
        sampler=sampler,
        weights="ema" if args.ema else "live",
        format=args.format,
        precision=args.precision,
        lora_rank=args.lora_rank,
        max_shard_bytes=args.max_shard_gb,
    )
    role = models.roles[args.role].spec
    wrong = [
        f"--{'.'.join(p.path).replace('_', '-')}: {p.message}"
        for p in models.family_plugin.export_problems(role, request)
    ]
    if wrong:
        raise CheckpointError("\n".join(wrong))
    return role, request
