"""What ComfyUI finds in this folder: nodes and browser files. Importing it does no more."""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI once. The nodes are imported here, because only ComfyUI can import them."""
    from .host.comfyui.paths import register_model_folder
    from .nodes import CustomDiffusionExtension

    register_model_folder()  # not in on_load, which ComfyUI 0.11 never calls for a pack
    return CustomDiffusionExtension()
