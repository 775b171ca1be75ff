"""What ComfyUI finds in this folder: the nodes, and the browser's files. Importing it does nothing
else.
"""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI once; the nodes are imported here, because only ComfyUI can import them."""
    from .nodes import CustomDiffusionExtension

    return CustomDiffusionExtension()
