"""``torchrun -m distill_train --config run.yaml``."""

from distill_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
