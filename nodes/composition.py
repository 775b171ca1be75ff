"""Several concepts in one picture."""

from typing import Any

from comfy_api.latest import io

from ..composition.routing import Route
from ..host.comfyui.routing import own_phrases, route_concepts
from .types import CATEGORY, chosen_concepts, concepts_input, told, without_leftovers


class RouteConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RouteConcepts",
            display_name="Route Concepts",
            category=CATEGORY,
            description="Puts concepts on a model, each at its own words of a prompt alone. "
            "Nothing is merged, so they do not disturb each other's words, and their order does "
            "not matter.",
            search_aliases=["combine concepts", "multi concept", "composition", "apply concept"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                concepts_input(1, "How many concepts to route."),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    @classmethod
    @without_leftovers
    def execute(cls, model: Any, clip: Any, concepts: Any) -> io.NodeOutput:
        routes = [Route(concept, strength) for concept, strength in chosen_concepts(concepts)]
        routed, knowing, remarks = route_concepts(model, clip, routes)
        table = [("concept", "acts at", "strength")]
        for route in routes:
            words = ", ".join(own_phrases(route.concept))
            table.append((route.concept.describe(), words, f"{route.strength:g}"))
        return io.NodeOutput(routed, knowing, ui=told(warnings=remarks, table=table))


NODES = [RouteConcepts]
