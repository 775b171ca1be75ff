"""Looking at the regions of a picture, and keeping what is in them apart."""

from typing import Any

from comfy_api.latest import io

from ..attention.drawing import attention_sheet
from ..composition.isolation import ISOLATED_FROM
from ..host.comfyui.isolation import isolated_guider
from ..pictures.tensors import to_tensor
from .types import CATEGORY, PlacesSocket, told


class IsolatedGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IsolatedGuider",
            display_name="Isolated Guider",
            category=CATEGORY,
            description="For subjects that look alike: each region of Apply Regions is drawn apart "
            "with its own prompt and concept, and joined. N regions need N + 1 passes a step in "
            "place of one, so it is slower.",
            search_aliases=["isolated diffusion", "OMG", "two of a kind", "multi concept"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that comes out of Apply Regions."),
                io.Conditioning.Input(
                    "positive", tooltip="The positive prompt that comes out of Apply Regions."
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What should not be in the picture, encoded with the CLIP of Apply "
                    "Regions.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How closely the prompt is followed, as in CFG Guider.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=ISOLATED_FROM,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="From which part of the sampling on the subjects are apart: 0 is its "
                    "first step. The steps before it set the layout, and cost as much as ever.",
                ),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, cfg: float, start_percent: float
    ) -> io.NodeOutput:
        guider = isolated_guider(model, positive, negative, cfg, start_percent)
        count = len(guider.subjects)
        line = f"{count + 1} passes a step in place of one, from {start_percent:.0%} on"
        return io.NodeOutput(guider, ui=told(line))


class ShowRegions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShowRegions",
            display_name="Show Regions",
            category=CATEGORY,
            description="Lays the regions over the pictures, given or found, and hands them out as "
            "masks.",
            search_aliases=["region masks", "found regions", "automatic mask"],
            inputs=[
                PlacesSocket.Input("places", tooltip="From Apply Regions."),
                io.Image.Input(
                    "images",
                    tooltip="The pictures that were drawn with these regions. Of several samplers "
                    "in a row, the last one is shown.",
                ),
            ],
            outputs=[io.Image.Output("sheet"), io.Mask.Output("masks")],
        )

    @classmethod
    def execute(cls, places: Any, images: Any) -> io.NodeOutput:
        where, names = places
        shares = where.of_pictures(len(images), *images.shape[1:3])
        sheet = to_tensor(attention_sheet(images, shares, names))[None]
        table = [("region", "share of each picture")]
        for name, region in zip(names, shares.transpose(0, 1), strict=True):
            table.append((name, ", ".join(f"{float(one.mean()):.0%}" for one in region)))
        return io.NodeOutput(sheet, shares.flatten(0, 1), ui=told(table=table))


NODES = [IsolatedGuider, ShowRegions]
