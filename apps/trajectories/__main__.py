"""``uv run apps/trajectories --config configs/tiny/trajectories.yaml``."""

from distill_trajectories.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
