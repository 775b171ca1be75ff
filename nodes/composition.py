"""Several concepts in one picture, each at its own words or in its own place."""

from typing import Any

from comfy_api.latest import io

from ..composition.masks import RegionError, box, feathered, single_mask
from ..composition.places import FOUND_AT
from ..composition.regions import Region
from ..composition.routing import Route
from ..composition.timing import Span
from ..host.comfyui.regions import apply_regions
from ..host.comfyui.routing import own_phrases, route_concepts
from .types import (
    CATEGORY,
    MOST_CONCEPTS,
    Concept,
    PlacesSocket,
    RegionSocket,
    chosen_concepts,
    concepts_input,
    span_inputs,
    told,
    without_leftovers,
)

_GIVEN, _FOUND = "box or mask", "find it"


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
                *span_inputs(),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    @classmethod
    @without_leftovers
    def execute(
        cls,
        model: Any,
        clip: Any,
        concepts: Any,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:
        routes = [Route(concept, strength) for concept, strength in chosen_concepts(concepts)]
        span = Span(start_percent, end_percent)
        routed, knowing, remarks = route_concepts(model, clip, routes, span)
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
            description="A place in the picture for one concept. Paint a mask, set a box (left 0, "
            "top 0, width 0.5, height 1 is the left half), or let it be found.",
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
                io.Combo.Input(
                    "place",
                    options=[_GIVEN, _FOUND],
                    default=_GIVEN,
                    optional=True,
                    tooltip="Choose find it if you do not know where the subject will be: the "
                    "first steps of the picture tell. Show Regions draws what was found.",
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
        place: str = _GIVEN,
    ) -> io.NodeOutput:
        route = Route(concept, strength)
        if place == _FOUND:
            if mask is not None:
                raise RegionError(
                    "A mask is connected, and place is 'find it'. Disconnect the mask, or choose "
                    "'box or mask'."
                )
            return io.NodeOutput(Region(prompt, None, route, feather))
        if mask is None:
            where = box(left, top, width, height)
            return io.NodeOutput(Region(prompt, feathered(where, feather), route))
        where = single_mask(mask)
        edges = f"{where.shape[1]} x {where.shape[0]}"
        note = told(
            f"The mask of {edges} pixels is scaled to the picture, whatever its size. Where their "
            "shapes differ, it is stretched."
        )
        return io.NodeOutput(Region(prompt, feathered(where, feather), route), ui=note)


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
                io.Float.Input(
                    "found_at",
                    default=FOUND_AT,
                    min=0.05,
                    max=0.9,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="For regions that are found: after which part of the sampling. Later "
                    "is surer where things are, and leaves fewer steps to keep them apart.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Conditioning.Output("positive"),
                PlacesSocket.Output("places"),
            ],
        )

    @classmethod
    @without_leftovers
    def execute(
        cls, model: Any, clip: Any, prompt: str, regions: Any, found_at: float = FOUND_AT
    ) -> io.NodeOutput:
        placed = list(regions.values())
        applied = apply_regions(model, clip, prompt, placed, found_at)
        table = [("region", "concept", "share of the picture")]
        names = []
        for name, region in regions.items():
            share = "found" if region.mask is None else f"{float(region.mask.mean()):.0%}"
            names.append(", ".join(own_phrases(region.route.concept)))
            table.append((name.removeprefix("region_"), names[-1], share))
        return io.NodeOutput(
            applied.model,
            applied.clip,
            applied.positive,
            (applied.places, names),
            ui=told(warnings=applied.remarks, table=table),
        )


NODES = [RouteConcepts, ConceptRegion, ApplyRegions]
