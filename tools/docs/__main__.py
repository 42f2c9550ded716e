"""Build the documentation site.

    uv run tools/docs build                  # into site/; a warning is an error
    uv run tools/docs build --to FOLDER
    uv run tools/docs serve                  # on localhost, rebuilt when a page changes

It needs no network, and the result works from its folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # and not this folder, whose names are those of a package


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="write the site")
    build.add_argument("--to", type=Path, default=HERE.parents[1] / "site", metavar="FOLDER")
    commands.add_parser("serve", help="show it on localhost:8000 while it is written")
    args = parser.parse_args(argv)
    return build_site(args.to) if args.command == "build" else serve_site()


def build_site(folder: Path) -> int:
    """Build the site into ``folder``; returns 1 if anything is amiss."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    config = load_config(str(HERE.parents[1] / "mkdocs.yml"), site_dir=str(folder.resolve()))
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    except Abort as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        config.plugins.on_shutdown()
    return 0


def serve_site() -> int:
    """Serve the site until Ctrl-C."""
    from mkdocs.commands.serve import serve

    serve(str(HERE.parents[1] / "mkdocs.yml"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
