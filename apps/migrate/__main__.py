"""``uv run apps/migrate --from checkpoint-1000 --to outputs/migrated``."""

from distill_migrate.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
