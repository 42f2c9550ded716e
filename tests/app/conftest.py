"""A right run file on the shipped tiny Wan, for tests to change."""

from run_files import values, write

__all__ = ["values", "write"]
