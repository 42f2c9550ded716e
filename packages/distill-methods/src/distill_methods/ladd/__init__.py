"""LADD: a GAN on a frozen teacher's features, and nothing else."""
