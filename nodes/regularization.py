"""Regularization sets: captioned pictures of the class that keep the model from drifting."""

from typing import Any

from comfy_api.latest import io

from ..host.comfyui.paths import NO_FOLDER, clip_weight_files, input_folders
from ..host.comfyui.regularization import (
    clip_problem,
    collection_fingerprint,
    draw_regularization,
    retrieve_regularization,
)
from ..host.open_clip.text import MODEL, MODELS
from ..trainer.regularization.retrieved import COUNT, LEAST_SIMILARITY
from .sampling_inputs import sampling_inputs
from .types import CATEGORY, RegularizationSet

CLASS_NOUN = "The everyday word for the subject. Use the one of Custom Diffusion Concept."


class DrawRegularization(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DrawRegularization",
            display_name="Draw Regularization Set",
            category=CATEGORY,
            description="Lets the model draw ordinary pictures of the class, if you have no "
            "photographs of it. They are kept: nothing is drawn twice, and an interrupted set "
            "resumes where it stopped. Photographs work better.",
            search_aliases=["class images", "prior preservation", "regularization images"],
            inputs=[
                io.Model.Input("model", tooltip="The model that you are going to train."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.String.Input("class_noun", default="cat", tooltip=CLASS_NOUN),
                io.Int.Input(
                    "count",
                    default=200,
                    min=1,
                    max=10_000,
                    tooltip="How many pictures; 200 as in the paper. Raise it later, and only the "
                    "missing ones are drawn.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Where the random noise starts. Change it to draw other pictures.",
                ),
                *sampling_inputs("Use the resolution of the training."),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=256,
                    advanced=True,
                    tooltip="How many pictures are drawn at once. Lower it if memory runs out.",
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
            description="Finds ordinary pictures of the class in a captioned collection of your "
            "own, by comparing the captions with CLIP. Captions are read only once.",
            search_aliases=["clip retrieval", "laion", "regularization images"],
            inputs=[
                io.Combo.Input(
                    "collection",
                    options=input_folders(),
                    default=NO_FOLDER,
                    tooltip="A folder in ComfyUI's input folder, or a link there: pictures with "
                    ".txt files, webdataset shards (.tar) or parquet tables, of any size.",
                ),
                io.String.Input("class_noun", default="cat", tooltip=CLASS_NOUN),
                io.Int.Input(
                    "count",
                    default=COUNT,
                    min=1,
                    max=10_000,
                    tooltip="How many pictures; 200 as in the paper. You get fewer if not enough "
                    "captions are similar.",
                ),
                io.Float.Input(
                    "similarity",
                    default=LEAST_SIMILARITY,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Minimum similarity of a caption to 'photo of a cat'. Raise it for "
                    "closer matches, lower it if too few are found.",
                ),
                io.Combo.Input(
                    "clip_model",
                    options=[*MODELS],
                    default=MODEL,
                    advanced=True,
                    tooltip="The model that clip_weights belongs to, as open_clip calls it. "
                    "OpenAI's weights need a name that ends with -quickgelu.",
                ),
                io.Combo.Input(
                    "clip_weights",
                    options=clip_weight_files(),
                    tooltip="The weights of an open_clip model: a .safetensors in "
                    "models/text_encoders. Nothing is downloaded for you.",
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
