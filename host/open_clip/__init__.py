"""open_clip: the vocabulary of CLIP, and its text space."""
