"""The pack's nodes: files that end in NODES; a node is a schema and one call."""

from comfy_api.latest import ComfyExtension, io

from . import applying, files, merging, training


class CustomDiffusionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*training.NODES, *files.NODES, *merging.NODES, *applying.NODES]
