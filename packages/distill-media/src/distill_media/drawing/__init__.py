"""Clips as files and pictures for people: MP4, GIF, contact sheets.

A clip is [T, H, W, 3] uint8 RGB here; callers that hold tensors convert them first
(``distill_runtime.to_uint8``).
"""
