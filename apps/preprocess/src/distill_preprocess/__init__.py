"""Makes training data from videos, pictures, captions and prompts."""
