"""Pictures of several subjects, made of the pictures that there are."""

from typing import Any

from comfy_api.latest import io, ui

from ..host.comfyui.composing import compose_pictures
from ..host.comfyui.inputs import folder_fingerprint
from ..host.comfyui.paths import NO_FOLDER, input_folders
from ..trainer.data.composing import MOST_COMPOSED
from .types import CATEGORY, MOST_CONCEPTS, RegularizationSet, TrainingConcept, told


class ComposePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ComposePictures",
            display_name="Compose Pictures",
            category=CATEGORY,
            description="Cuts subjects out by their masks and pastes them beside each other onto "
            "backgrounds, with captions and masks. Teaches subjects to appear together, or one "
            "subject without its surroundings.",
            search_aliases=["gen4gen", "cut and paste", "collage", "multi subject", "augmentation"],
            inputs=[
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(
                        TrainingConcept.Input(
                            "concept",
                            tooltip="A Custom Diffusion Concept whose pictures have masks. Each "
                            "composed picture shows one subject of every concept here.",
                        ),
                        prefix="concept",
                        min=1,
                        max=MOST_CONCEPTS,
                    ),
                    tooltip="Whose subjects to paste. The first one gets the composed pictures; "
                    "connect the others to Custom Diffusion Train as they are.",
                ),
                io.Int.Input(
                    "count",
                    default=16,
                    min=1,
                    max=MOST_COMPOSED,
                    tooltip="How many pictures to compose.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Edge of the composed pictures in pixels. Use the resolution of the "
                    "training.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Decides what goes where. The same seed gives the same pictures.",
                ),
                io.Boolean.Input(
                    "keep_own",
                    default=True,
                    tooltip="Also train on the first concept's own pictures, not only on the "
                    "composed ones.",
                ),
                io.Combo.Input(
                    "background_folder",
                    options=input_folders(),
                    default=NO_FOLDER,
                    tooltip="A folder in ComfyUI's input folder with pictures of places without "
                    "the subjects. beach.txt next to beach.jpg says what the caption says of it: "
                    "on a beach.",
                ),
                io.String.Input(
                    "places",
                    default="",
                    multiline=True,
                    tooltip="What captions say of the connected backgrounds, one line each, such "
                    "as: on a beach. Leave it empty to say nothing.",
                ),
                io.Image.Input(
                    "backgrounds",
                    optional=True,
                    tooltip="Pictures of places, your own or from VAE Decode.",
                ),
                RegularizationSet.Input(
                    "background_set",
                    optional=True,
                    tooltip="Places that the model draws: Draw Regularization Set with a place, "
                    "such as beach, as its class noun.",
                ),
            ],
            outputs=[
                TrainingConcept.Output(display_name="training concept"),
                io.Image.Output(display_name="pictures"),
                io.Mask.Output(display_name="masks"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, background_folder: Any, **inputs: object) -> str:
        return folder_fingerprint(background_folder)

    @classmethod
    def execute(cls, concepts: Any, **settings: Any) -> io.NodeOutput:
        made = compose_pictures([one for one in concepts.values() if one], **settings)
        shown = told(*made.lines, **ui.PreviewImage(made.sheet, cls=cls).as_dict())
        return io.NodeOutput(made.concept, made.pictures, made.masks, ui=shown)


NODES = [ComposePictures]
