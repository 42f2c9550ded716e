"""``uv run apps/sample outputs/mine --prompt "a red fox in the snow"``."""

from distill_sample.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
