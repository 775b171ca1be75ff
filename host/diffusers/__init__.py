"""The pack without ComfyUI: on the components of a diffusers pipeline."""
