"""``uv run apps/preprocess --config data.yaml``."""

from distill_preprocess.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
