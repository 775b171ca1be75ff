"""Watching cross-attention: where in a picture each word of its prompt is looked at."""
