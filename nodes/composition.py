"""Several concepts in one picture."""

from typing import Any

from comfy_api.latest import io

from ..composition.routing import Route
from ..host.comfyui.routing import own_phrases, route_concepts
from .types import CATEGORY, chosen_concepts, concepts_input, told


class RouteConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RouteConcepts",
            display_name="Route Concepts",
            category=CATEGORY,
            description="Adds concepts to a model, each acting only at its own words of the "
            "prompt. Nothing is merged, so they do not disturb each other, and their order does "
            "not matter.",
            search_aliases=["combine concepts", "multi concept", "composition", "apply concept"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The checkpoint the concepts were trained on, or a close relative. It "
                    "is not changed.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of the same checkpoint. Encode your prompts with the CLIP "
                    "that comes out of this node.",
                ),
                concepts_input(1, "How many concepts to use. The inputs below follow this number."),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, concepts: Any) -> io.NodeOutput:
        routes = [Route(concept, strength) for concept, strength in chosen_concepts(concepts)]
        routed, knowing, remarks = route_concepts(model, clip, routes)
        table = [("concept", "acts at", "strength")]
        for route in routes:
            words = ", ".join(own_phrases(route.concept))
            table.append((route.concept.describe(), words, f"{route.strength:g}"))
        return io.NodeOutput(routed, knowing, ui=told(warnings=remarks, table=table))


NODES = [RouteConcepts]
