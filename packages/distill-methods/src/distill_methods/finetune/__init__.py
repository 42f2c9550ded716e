"""Finetune: flow matching on data."""
