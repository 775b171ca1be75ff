"""Where a model looks for each word of a prompt."""

from typing import Any

from comfy_api.latest import io

from ..attention.drawing import advice, attention_sheet, overlap_table
from ..host.comfyui.attention import watch_attention
from ..pictures.tensors import to_tensor
from .types import CATEGORY, told

AttentionRecord = io.Custom("ATTENTION_RECORD")
_LEVELS = ("all", "1/8", "1/16", "1/32", "1/64")


class WatchAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WatchAttention",
            display_name="Watch Attention",
            category=CATEGORY,
            description="Records where the model looks for chosen words of the prompt while it "
            "draws. Show Attention lays it over the picture. The picture stays the same.",
            search_aliases=["attention map", "heatmap", "DAAM", "cross attention", "debug prompt"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that draws, with its concepts: from Apply Concept, Route "
                    "Concepts or a checkpoint.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP from the same node as the model."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="photo of a <new1> cat",
                    tooltip="The prompt of the picture. This node takes the place of CLIP Text "
                    "Encode.",
                ),
                io.String.Input(
                    "words",
                    multiline=True,
                    default="",
                    tooltip="Words of the prompt to watch, one a line, 16 at most. Leave it empty "
                    "for the trigger words, each with the word behind it.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Conditioning.Output("positive"),
                AttentionRecord.Output("attention"),
            ],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, prompt: str, words: str) -> io.NodeOutput:
        watched, positive, recorder = watch_attention(model, clip, prompt, words)
        named = ", ".join(word.text for word in recorder.words)
        return io.NodeOutput(watched, positive, recorder, ui=told(f"Watches {named}."))


class ShowAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShowAttention",
            display_name="Show Attention",
            category=CATEGORY,
            description="Lays the attention of each watched word over the pictures: bright is "
            "where the model looks for it. Says which words look at the same place and may mix.",
            search_aliases=["attention map", "heatmap", "DAAM", "overlap", "why do concepts mix"],
            inputs=[
                AttentionRecord.Input("attention", tooltip="From Watch Attention."),
                io.Image.Input(
                    "images",
                    tooltip="The pictures that were drawn with the model of Watch Attention. Of "
                    "several samplers in a row, the last one is shown.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="From which part of the sampling on: 0 is its first step. Early steps "
                    "decide where things are.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Up to which part of the sampling: 1 is its last step. Late steps "
                    "decide details.",
                ),
                io.Combo.Input(
                    "resolution",
                    options=list(_LEVELS),
                    default="all",
                    tooltip="Which layers: those whose places are this share of a pixel's edge, "
                    "or all. Fine ones look at details, coarse ones at the layout.",
                ),
            ],
            outputs=[io.Image.Output("sheet")],
        )

    @classmethod
    def execute(
        cls, attention: Any, images: Any, start: float, end: float, resolution: str
    ) -> io.NodeOutput:
        recorded = attention.maps()
        halvings = None if resolution == "all" else _LEVELS.index(resolution) - 1
        maps = recorded.between(start, end, halvings)
        sheet = to_tensor(attention_sheet(images, maps, recorded.words))[None]
        table = [("words", "overlap", ""), *overlap_table(maps, recorded.words)]
        warnings = advice(maps, recorded.words)
        shown = told(warnings=warnings, table=table if len(table) > 1 else [])
        return io.NodeOutput(sheet, ui=shown)


NODES = [WatchAttention, ShowAttention]
