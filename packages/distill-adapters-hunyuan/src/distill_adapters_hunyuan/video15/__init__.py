"""HunyuanVideo 1.5: two text encoders, and pictures in channels of their own."""
