"""Regularization sets: captioned pictures of the class that keep the model from drifting."""

from comfy_api.latest import io

from ..host.comfyui.regularization import SAMPLERS, SCHEDULERS, draw_regularization
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
    def execute(cls, model, clip, vae, **settings) -> io.NodeOutput:
        return io.NodeOutput(draw_regularization(model, clip, vae, **settings))


NODES = [DrawRegularization]
