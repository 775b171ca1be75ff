"""The pack's nodes: files that end in NODES; a node is a schema and one call."""

from comfy_api.latest import ComfyExtension, io

from ..host.comfyui.http.routes import add_routes
from ..host.comfyui.paths import register_model_folder
from ..host.comfyui.unknown_words import watch_prompts
from . import (
    applying,
    attention,
    composing,
    composition,
    compression,
    concept,
    editing,
    evaluation,
    files,
    inspection,
    jobs,
    merging,
    places,
    regularization,
    training,
)


class CustomDiffusionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in on_load, which ComfyUI 0.11 never calls for a pack.
        register_model_folder()
        add_routes()
        # A link that is dropped is offered what takes it in this order: first Apply Concept, Train.
        concepts = (
            applying,
            composition,
            places,
            merging,
            editing,
            files,
            compression,
            inspection,
            attention,
            evaluation,
        )
        modules = (*concepts, training, concept, composing, jobs, regularization)
        nodes = [node for module in modules for node in module.NODES]
        watch_prompts({node.define_schema().node_id for node in nodes})
        return nodes
