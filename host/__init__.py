"""Adapters between the pack and the programs that own the models: ComfyUI and diffusers."""
