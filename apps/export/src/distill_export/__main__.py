"""``python -m distill_export --checkpoint outputs/mine --role student --to student``."""

from distill_export.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
