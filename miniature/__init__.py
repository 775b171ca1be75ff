"""A model small enough to run the main job anywhere, without downloading anything."""
