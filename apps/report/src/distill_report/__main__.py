"""``python -m distill_report outputs/mine``."""

from distill_report.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
