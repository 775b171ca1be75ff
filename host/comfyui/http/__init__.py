"""The routes in ComfyUI's server."""
