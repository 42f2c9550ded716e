"""A GAN beside or instead of another loss: the parts that methods with a discriminator share."""
