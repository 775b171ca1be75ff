"""Teaching a concept: configuration, data, augmentation, objective, trainable parameters, loop,
jobs.

Sees a model only through `diffusion/protocols.py`. Knows no ComfyUI, no diffusers, no merging.
"""
