"""Trainings in the process of ComfyUI: how they start, what they hold, how they make room."""
