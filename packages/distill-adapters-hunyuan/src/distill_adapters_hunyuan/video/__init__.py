"""HunyuanVideo: guidance is an input of its transformer."""
