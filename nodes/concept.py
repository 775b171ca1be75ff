"""What to teach, and what a training will see of it."""

from typing import Any

from comfy_api.latest import io, ui

from ..host.comfyui.inputs import (
    KINDS,
    draw_contact_sheet,
    draw_picture_sheet,
    folder_fingerprint,
    folders_advice,
    training_concept,
)
from ..host.comfyui.paths import NO_FOLDER, input_folders
from ..trainer.config import TrainConfig
from ..trainer.data.advice import advice
from .training_inputs import setting_input, setting_inputs
from .types import CATEGORY, RegularizationSet, TrainingConcept, told


class CustomDiffusionConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CustomDiffusionConcept",
            display_name="Custom Diffusion Concept",
            category=CATEGORY,
            description="What to teach: 4 to 20 pictures of a thing or a style, and its words.",
            search_aliases=["dreambooth images", "training images", "instance images"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of the concept. Leave it open to use a folder instead.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask a picture: what is white (1) is learnt, the rest is not.",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="One caption a picture, with the modifier token in it. Without: "
                    "'photo of a <new1> cat'.",
                ),
                io.Combo.Input(
                    "folder",
                    options=input_folders(),
                    default=NO_FOLDER,
                    tooltip="A folder of pictures in ComfyUI's input folder, used when no images "
                    "are connected. The first line of a .txt or .caption file beside a picture is "
                    "its caption, a .mask.png file its mask.",
                ),
                io.String.Input(
                    "class_noun",
                    default="cat",
                    tooltip="The everyday word for the thing: cat, mug, chair.",
                ),
                io.String.Input(
                    "modifier_token",
                    default="<new1>",
                    tooltip="The new word, in angle brackets. Prompts then say '<new1> cat'. Give "
                    "every concept its own. Empty: the class noun itself is taught, for a kind of "
                    "thing that the model does not know.",
                ),
                io.Combo.Input(
                    "regularization_folder",
                    options=input_folders(),
                    default=NO_FOLDER,
                    tooltip="Not needed where a modifier token is taught as usual. Else about 200 "
                    "ordinary pictures of the class, which keep the model from drifting. A .txt "
                    "file beside a picture is its caption.",
                ),
                RegularizationSet.Input(
                    "regularization_set",
                    optional=True,
                    tooltip="Such pictures from another node, instead of a folder.",
                ),
                io.String.Input(
                    "initializer",
                    default="",
                    advanced=True,
                    tooltip="A word the token starts from. Empty: a rare one, as in the paper.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="thing",
                    tooltip="Of a thing there is a 'photo of a <new1> cat'; of a style, a "
                    "'painting in the style of <new1> art', with the class noun art.",
                ),
            ],
            outputs=[TrainingConcept.Output(display_name="training concept")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        return folder_fingerprint(inputs.get("folder"), inputs.get("regularization_folder"))

    @classmethod
    def execute(
        cls,
        folder: Any,
        class_noun: Any,
        modifier_token: Any,
        regularization_folder: Any,
        initializer: Any,
        kind: Any,
        images: Any = None,
        masks: Any = None,
        captions: Any = None,
        regularization_set: Any = None,
    ) -> io.NodeOutput:
        concept = training_concept(
            images=images or [],
            masks=masks or [],
            captions=captions or [],
            folder=folder[0],
            class_noun=class_noun[0],
            token=modifier_token[0],
            regularization_folder=regularization_folder[0],
            regularization_set=regularization_set[0] if regularization_set else (),
            initializer=initializer[0],
            kind=kind[0],
        )
        warnings = [*folders_advice(folder[0], regularization_folder[0]), *advice(concept)]
        words = f"{len(concept.images)} pictures, {len(concept.regularization)} regularization"
        if (often := sum(image.repeats for image in concept.images)) > len(concept.images):
            words += f"; with repeats the pictures count as {often}"
        sheet = draw_picture_sheet(concept)
        shown = told(words, warnings=warnings, **ui.PreviewImage(sheet, cls=cls).as_dict())
        return io.NodeOutput(concept, ui=shown)


class CustomDiffusionViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CustomDiffusionViews",
            display_name="Custom Diffusion Views",
            category=CATEGORY,
            description="Shows what a training will see: pictures as they are cropped, resized and "
            "mirrored, with their captions. What does not count is dark.",
            search_aliases=["contact sheet", "dataset preview"],
            is_output_node=True,
            inputs=[
                TrainingConcept.Input("concept"),
                setting_input("resolution"),
                setting_input("seed"),
                *setting_inputs("views"),
            ],
            outputs=[io.Image.Output(display_name="contact sheet")],
        )

    @classmethod
    def execute(cls, concept: Any, **settings: Any) -> io.NodeOutput:
        sheet = draw_contact_sheet(concept, TrainConfig(**settings))
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


NODES = [CustomDiffusionConcept, CustomDiffusionViews]
