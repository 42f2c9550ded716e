"""Build the documentation site.

    uv run tools/docs build                  # into site/; a warning is an error
    uv run tools/docs build --to FOLDER
    uv run tools/docs serve                  # on localhost, rebuilt when a page changes
    uv run tools/docs memory                 # plan the table of docs/reference/memory.md anew
    uv run tools/docs families FILE.xml     # the tables of docs/reference/families.md
    uv run tools/docs picture                # docs/teacher_student.webp, of outputs/tiny-dmd2

It needs no network, and the result works from its folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[0] = str(HERE.parent)  # and not this folder, whose names are those of a package


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="write the site")
    build.add_argument("--to", type=Path, default=ROOT / "site", metavar="FOLDER")
    commands.add_parser("serve", help="show it on localhost:8000 while it is written")
    commands.add_parser("memory", help="plan the table of memory anew (minutes)")
    families = commands.add_parser("families", help="write the tables of families by methods")
    families.add_argument("results", type=Path, nargs="+", help="JUnit files of their test")
    picture = commands.add_parser("picture", help="make the README's picture of a finished run")
    picture.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny-dmd2")
    picture.add_argument("--to", type=Path, default=ROOT / "docs" / "teacher_student.webp")
    args = parser.parse_args(argv)
    if args.command == "memory":
        from docs.memory import write_table

        write_table()
        return 0
    if args.command == "families":
        from docs.families import write_tables

        write_tables(args.results)
        return 0
    if args.command == "picture":
        from docs.picture import make_picture

        make_picture(args.run, args.to)
        return 0
    return build_site(args.to) if args.command == "build" else serve_site()


def build_site(folder: Path) -> int:
    """Build the site into ``folder``; returns 1 if anything is amiss."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder.resolve()))
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

    serve(str(ROOT / "mkdocs.yml"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
