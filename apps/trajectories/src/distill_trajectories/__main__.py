"""``python -m distill_trajectories --config FILE.yaml``."""

from distill_trajectories.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
