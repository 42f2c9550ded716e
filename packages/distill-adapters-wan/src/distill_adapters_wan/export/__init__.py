"""Export of a Wan role: what is Wan's of it, on ``distill_diffusers.export``."""
