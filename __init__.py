"""What ComfyUI finds in this folder: nodes and browser files. Importing it does no more."""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI once. The nodes are imported here, because only ComfyUI can import them."""
    from .nodes import CustomDiffusionExtension

    return CustomDiffusionExtension()
