"""Several concepts in one picture."""

from typing import Any

from comfy_api.latest import io

from ..composition.regions import Region, box, feathered, single_mask
from ..composition.routing import Route
from ..host.comfyui.regions import apply_regions
from ..host.comfyui.routing import own_phrases, route_concepts
from .types import (
    CATEGORY,
    MOST_CONCEPTS,
    Concept,
    RegionSocket,
    chosen_concepts,
    concepts_input,
    told,
    without_leftovers,
)


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
    @without_leftovers
    def execute(cls, model: Any, clip: Any, concepts: Any) -> io.NodeOutput:
        routes = [Route(concept, strength) for concept, strength in chosen_concepts(concepts)]
        routed, knowing, remarks = route_concepts(model, clip, routes)
        table = [("concept", "acts at", "strength")]
        for route in routes:
            words = ", ".join(own_phrases(route.concept))
            table.append((route.concept.describe(), words, f"{route.strength:g}"))
        return io.NodeOutput(routed, knowing, ui=told(warnings=remarks, table=table))


class ConceptRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptRegion",
            display_name="Concept Region",
            category=CATEGORY,
            description="A place in the picture for one concept. Paint a mask, or set a box: left "
            "0, top 0, width 0.5, height 1 is the left half.",
            search_aliases=["regional prompt", "attention couple", "area", "mask concept"],
            inputs=[
                Concept.Input("concept", tooltip="The concept to draw in this place."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="A prompt for this place only, with the concept's words. Start with it "
                    "empty: then the prompt for the whole picture is used.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White is the place; any size works. Leave it unconnected to use the "
                    "box.",
                ),
                *(
                    io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tip)
                    for name, default, tip in (
                        (
                            "left",
                            0.0,
                            "Left edge of the box: 0 is the left of the picture, 1 the right.",
                        ),
                        (
                            "top",
                            0.0,
                            "Upper edge of the box: 0 is the top of the picture, 1 the bottom.",
                        ),
                        ("width", 0.5, "Width of the box: 1 is the whole width of the picture."),
                        ("height", 1.0, "Height of the box: 1 is the whole height of the picture."),
                    )
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of the concept. 1 is as trained; lower it if it looks "
                    "overdone.",
                ),
                io.Float.Input(
                    "feather",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How wide the edge fades; 1 is the picture's shorter side. Raise it "
                    "if you see a seam.",
                ),
            ],
            outputs=[RegionSocket.Output("region")],
        )

    @classmethod
    def execute(
        cls,
        concept: Any,
        prompt: str,
        left: float,
        top: float,
        width: float,
        height: float,
        strength: float,
        feather: float,
        mask: Any = None,
    ) -> io.NodeOutput:
        place = box(left, top, width, height) if mask is None else single_mask(mask)
        return io.NodeOutput(Region(prompt, feathered(place, feather), Route(concept, strength)))


class ApplyRegions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyRegions",
            display_name="Apply Regions",
            category=CATEGORY,
            description="Draws each concept in its own place, in one pass. Inside a region only "
            "its concept acts; the rest follows the prompt for the whole picture. Nothing is "
            "merged.",
            search_aliases=["regional prompt", "attention couple", "multi concept", "composition"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The checkpoint the concepts were trained on, or a close relative.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="photo of a <new1> cat next to a <new2> dog",
                    tooltip="The prompt for the whole picture, with the words of all its concepts.",
                ),
                # A combination of sockets alone makes no node: ComfyUI's page 1.49 throws.
                io.Autogrow.Input(
                    "regions",
                    template=io.Autogrow.TemplateNames(
                        RegionSocket.Input(
                            "region", tooltip="A place with its concept, from Concept Region."
                        ),
                        names=[f"region_{number}" for number in range(1, MOST_CONCEPTS + 1)],
                        min=1,
                    ),
                    tooltip="One region for each concept, up to eight.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Conditioning.Output("positive"),
            ],
        )

    @classmethod
    @without_leftovers
    def execute(cls, model: Any, clip: Any, prompt: str, regions: Any) -> io.NodeOutput:
        placed = list(regions.values())
        routed, knowing, positive, remarks = apply_regions(model, clip, prompt, placed)
        table = [("region", "concept", "share of the picture")]
        for name, region in regions.items():
            share = f"{float(region.mask.mean()):.0%}"
            table.append(
                (name.removeprefix("region_"), ", ".join(own_phrases(region.route.concept)), share)
            )
        shown = told(warnings=remarks, table=table)
        return io.NodeOutput(routed, knowing, positive, ui=shown)


NODES = [RouteConcepts, ConceptRegion, ApplyRegions]
