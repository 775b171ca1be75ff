"""The only folder that imports ComfyUI."""
