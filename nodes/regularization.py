"""Regularization sets: captioned pictures of the class that keep the model from drifting."""

from typing import Any

from comfy_api.latest import io

from ..host.comfyui.paths import NO_FOLDER, clip_weight_files, input_folders
from ..host.comfyui.regularization import (
    SAMPLERS,
    SCHEDULERS,
    clip_problem,
    collection_fingerprint,
    draw_regularization,
    retrieve_regularization,
)
from ..host.open_clip.text import MODEL, MODELS
from ..trainer.regularization.retrieved import COUNT, LEAST_SIMILARITY
from .types import CATEGORY, RegularizationSet


class DrawRegularization(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DrawRegularization",
            display_name="Draw Regularization Set",
            category=CATEGORY,
            description="Lets the model itself draw pictures of the class, for those who have no "
            "photographs of it. They are kept: the same inputs draw nothing twice, and an "
            "interrupted set goes on where it stopped. Photographs work better.",
            search_aliases=["class images", "prior preservation", "regularization images"],
            inputs=[
                io.Model.Input("model", tooltip="The model that is going to be taught."),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.String.Input(
                    "class_noun", default="cat", tooltip="As in Custom Diffusion Concept."
                ),
                io.Int.Input("count", default=200, min=1, max=10_000),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False),
                io.Int.Input("steps", default=25, min=1, max=1000),
                io.Float.Input("cfg", default=6.0, min=0.0, max=100.0, step=0.1),
                io.Combo.Input("sampler_name", options=SAMPLERS),
                io.Combo.Input("scheduler", options=SCHEDULERS),
                io.Int.Input("resolution", default=512, min=64, max=2048, step=8),
                io.Int.Input(
                    "batch_size", default=4, min=1, max=256, advanced=True, tooltip="Drawn at once."
                ),
            ],
            outputs=[RegularizationSet.Output(display_name="regularization set")],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(draw_regularization(model, clip, vae, **settings))


class RetrieveRegularization(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RetrieveRegularization",
            display_name="Retrieve Regularization Set",
            category=CATEGORY,
            description="Takes pictures of the class out of a large captioned collection of your "
            "own: those whose captions are nearest in CLIP's text space. Captions are read once.",
            search_aliases=["clip retrieval", "laion", "regularization images"],
            inputs=[
                io.Combo.Input(
                    "collection",
                    options=input_folders(),
                    default=NO_FOLDER,
                    tooltip="A folder in ComfyUI's input folder, or a link there: pictures with "
                    ".txt files, webdataset shards (.tar) or parquet tables, of any size.",
                ),
                io.String.Input(
                    "class_noun", default="cat", tooltip="As in Custom Diffusion Concept."
                ),
                io.Int.Input("count", default=COUNT, min=1, max=10_000),
                io.Float.Input(
                    "similarity",
                    default=LEAST_SIMILARITY,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Captions that are less near to 'photo of a cat' are not taken.",
                ),
                io.Combo.Input(
                    "clip_model",
                    options=[*MODELS],
                    default=MODEL,
                    advanced=True,
                    tooltip="The CLIP model that the weights belong to, as open_clip calls it. "
                    "OpenAI's weights need a name that ends with -quickgelu.",
                ),
                io.Combo.Input(
                    "clip_weights",
                    options=clip_weight_files(),
                    tooltip="A .safetensors of an open_clip model in models/text_encoders. "
                    "Nothing is downloaded.",
                ),
            ],
            outputs=[RegularizationSet.Output(display_name="regularization set")],
        )

    @classmethod
    def fingerprint_inputs(cls, collection: str, **inputs: object) -> str:
        return collection_fingerprint(collection)

    @classmethod
    def validate_inputs(cls, clip_model: str, clip_weights: str) -> bool | str:
        return clip_problem(clip_model, clip_weights) or True

    @classmethod
    def execute(cls, collection: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(retrieve_regularization(collection, **settings))


NODES = [DrawRegularization, RetrieveRegularization]
