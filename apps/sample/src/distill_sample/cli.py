"""The command line. torch is imported only once the request is found right."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from distill_protocols import ConfigError, DistillError, SamplerSpec
from distill_protocols.sampler import Solver
from distill_runfile import cli
from distill_runfile.cli import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from distill_runtime import UnreadableFileError, read_bytes

from distill_sample.sources import STUDENT, SampleSource, Weights, read_sample_source

if TYPE_CHECKING:
    from distill_sample.request import Request

_EPILOG = """\
FROM is a run's output folder (its newest checkpoint is taken), a checkpoint, or an export of any
format. A student is sampled as it was trained, by the run's own sampler. Clip n has the noise that
a stock pipeline draws after torch.manual_seed(SEED + n): on a CPU it is the same clip.

  uv run apps/sample outputs/mine --prompt "a red fox in the snow" --also teacher --steps 32
  uv run apps/sample outputs/mine --prompts prompts.txt --seed 7 --batch 4
  uv run apps/sample outputs/causal --prompt "waves at dusk" --latent-frames 200
  uv run apps/sample student-lora --base models/wan --prompt "a red fox in the snow"

several processes: uv run torchrun --nproc-per-node 8 apps/sample ...

exit status: 0 written, 1 failed, 2 the request is wrong, 74 a file could not be written, 130
interrupted.
"""

_MOST_PROMPT_BYTES = 1 << 24


@cli.outlive_readers()
def main(argv: list[str] | None = None) -> int:
    """Run the app; returns the exit status."""
    args = _parser().parse_args(argv)
    cli.show_logs()
    try:
        source, request = _read(args)
    except ConfigError as error:
        return cli.print_problems(error, "nothing was sampled")
    except DistillError as error:
        cli.say(error, sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED

    def sample() -> int:
        from distill_runtime import sigterm_as_interrupt

        from distill_sample.run import run

        with sigterm_as_interrupt():
            run(source, request)
        return EXIT_OK

    return cli.run_command(
        sample, interrupted=lambda: f"interrupted: clips that were finished are in {request.to}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("sample", "Sample clips from a run or an exported student.", _EPILOG)
    add = parser.add_argument
    add("source", type=Path, metavar="FROM", help="see below")
    add("--prompt", action="append", default=[], metavar="TEXT", help="one clip; may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="a text file, one prompt a line")
    add("--image", type=Path, action="append", default=[], metavar="FILE",
        help="first frame: one for all prompts, or one for each; scaled and cropped")  # fmt: skip
    add("--last-image", type=Path, action="append", default=[], metavar="FILE",
        help="last frame, beside --image")  # fmt: skip
    add("--video", type=Path, action="append", default=[], metavar="FILE",
        help="instead of --image: a video that the clip goes on from")  # fmt: skip
    add("--video-frames", type=cli.positive_integer("frames"), default=1, metavar="N",
        help="last frames of the video that the clip begins with (default 1)")  # fmt: skip
    add("--to", type=Path, metavar="FOLDER",
        help="default: samples/ in the run's output folder, or beside the export")  # fmt: skip
    add("--role", metavar="NAME", help="of a run; default: student")
    add("--weights", choices=get_args(Weights), default="auto",
        help="of a checkpoint: averaged or live; auto: averaged where there are")  # fmt: skip
    add("--base", metavar="MODEL",
        help="the model that a lora or comfyui export belongs to, a Diffusers folder or hub id; "
        "default: the hub id that the export names")  # fmt: skip
    add("--also", action="append", default=[], metavar="ROLE",
        help="another role of the run, such as teacher, from the same noise")  # fmt: skip
    sampler = parser.add_argument_group(
        "sampler", "of the roles that --also names; without --also of the role itself"
    )
    sampler.add_argument("--steps", type=cli.positive_integer("steps"), metavar="N")
    sampler.add_argument("--guidance", type=float, metavar="W", help="w in u + w (c - u)")
    sampler.add_argument("--shift", type=float, metavar="K")
    sampler.add_argument("--solver", choices=get_args(Solver))
    add("--negative", metavar="TEXT", help="negative prompt; default: the run's, or the empty one")
    add("--seed", type=_seed, default=0, metavar="N", help="of the first clip (default 0)")
    add("--batch", type=cli.positive_integer("clips"), default=1, metavar="N",
        help="clips at once (default 1)")  # fmt: skip
    add("--latent-frames", type=cli.positive_integer("latent frames"), metavar="N",
        help="stream a video of this length chunk by chunk, from a causal role")  # fmt: skip
    add("--format", choices=("mp4", "gif", "png"), default="mp4",
        help="of clips (png: a folder of frames); pictures are always PNG")  # fmt: skip
    add("--fps", type=_fps, metavar="N", help="default: that of the run's validation, or 16")
    return parser


def _read(args: argparse.Namespace) -> tuple[SampleSource, Request]:
    from distill_sample.request import Request

    prompts = [*args.prompt, *_read_prompts(args.prompts)]
    problems = []
    if not prompts:
        problems.append("no prompt: give --prompt TEXT or --prompts FILE")
    problems += _file_problems(args, len(prompts))
    if args.latent_frames and (len(prompts) > 1 or args.also):
        problems.append("--latent-frames streams one video: give one --prompt, and no --also")
    samplers, wrong = _samplers(args)
    problems += wrong
    try:
        source = read_sample_source(
            args.source, role=args.role, weights=args.weights, also=args.also,
            samplers=samplers, base=args.base,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if args.latent_frames:
        problems += _stream_problems(source, args.latent_frames)
    request = Request(
        prompts=tuple(prompts),
        images=tuple(args.image),
        last_images=tuple(args.last_image),
        videos=tuple(args.video),
        video_frames=args.video_frames,
        seed=args.seed,
        batch=args.batch,
        latent_frames=args.latent_frames,
        negative_prompt=args.negative,
        to=(args.to or source.default_output).absolute(),
        format=args.format,
        fps=args.fps or source.fps,
    )
    problems += _given_problems(source, request)
    if problems:
        raise ConfigError(problems)
    if source.main in samplers:
        cli.say(f"{source.main} is sampled as these options say, not as it was trained")
    return source, request


def _file_problems(args: argparse.Namespace, prompts: int) -> list[str]:
    """Report pictures and videos that are not there, or are too few or too many."""
    problems = []
    files = {"--image": args.image, "--last-image": args.last_image, "--video": args.video}
    for option, paths in files.items():
        if len(paths) not in (0, 1, prompts):
            problems.append(
                f"{option}: {len(paths)} files for {prompts} prompts; give one for all, or one for "
                "each"
            )
        problems += [f"{option}: there is no file {path}" for path in paths if not path.is_file()]
    if args.image and args.video:
        problems.append("--image beside --video: a clip begins with one of the two. Give one")
    return problems


def _given_problems(source: SampleSource, request: Request) -> list[str]:
    """Report frames that the models cannot be given, or cannot do without."""
    option = "--last-image" if request.last_images else "--video" if request.videos else "--image"
    family, pipeline = source.family_plugin, source.pipeline
    frames = next(iter(family.clip_shapes(pipeline)), (None,))[0]
    for name, role in source.roles.items():
        readable = family.frame_conditions(role.spec, pipeline)
        if (problem := readable.problem(request.given, frames)) is not None:
            return [f"{option}: role {name!r}: {problem}"]
    return []


def _stream_problems(source: SampleSource, frames: int) -> list[str]:
    family, pipeline = source.family_plugin, source.pipeline
    if source.main in family.capabilities(pipeline).causal_roles:
        shape = family.latent_shape(pipeline, source=source.components)
        readable = family.frame_conditions(source.roles[source.main].spec, pipeline)
        if shape is None or readable.first != "always" or frames <= shape[1]:
            return []
        return [
            f"--latent-frames {frames}: {source.main!r} reads its first frame beside every frame "
            f"of a clip, and there are {shape[1]} of them. Give at most these"
        ]
    return [
        f"--latent-frames: {source.main!r} is not causal and makes a clip as a whole, of the "
        "length that it was trained on. Leave it out"
    ]


def _samplers(args: argparse.Namespace) -> tuple[dict[str, SamplerSpec], list[str]]:
    names = args.also or [args.role or STUDENT]
    given = {
        key: value
        for key in ("steps", "guidance", "shift", "solver")
        if (value := vars(args)[key]) is not None
    }
    if not given:
        return {}, []
    if "steps" not in given:
        return {}, ["--guidance, --shift and --solver make a sampler with --steps: give it too"]
    try:
        return dict.fromkeys(names, SamplerSpec(**given)), []
    except ValueError as error:
        return {}, [f"--steps, --guidance, --shift, --solver: {error}"]


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        text = read_bytes(file, max_bytes=_MOST_PROMPT_BYTES).decode("utf-8-sig")
    except (UnreadableFileError, UnicodeDecodeError) as error:
        raise ConfigError(
            [f"--prompts: {file} is no list of prompts, one a line in UTF-8: {error}"]
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 to 2^63 - 1")
    return int(text)


def _fps(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 240:
        raise argparse.ArgumentTypeError(f"{text!r} must be frames per second, from 0.1 to 240")
    return value
