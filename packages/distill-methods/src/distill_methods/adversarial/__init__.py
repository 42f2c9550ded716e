"""A discriminator's two turns: no method, but what those with a GAN have in common."""
