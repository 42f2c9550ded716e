"""What only a device can tell: kernels, stalls, memory, compilation; see ``__main__``."""
