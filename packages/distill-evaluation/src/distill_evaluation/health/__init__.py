"""The health of a distillation: what is measured, which rules watch it, and what an alarm does."""
