"""Combining concepts that were taught apart: closed-form constrained least squares (Custom
Diffusion, Eq. 4-5).

Tensors in, tensors out. Knows concepts and the text encoder's contract; no model, no ComfyUI, no
training.
"""
