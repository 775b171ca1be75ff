"""What to teach, and what a training will see of it."""

from typing import Any

from comfy_api.latest import io, ui

from ..concept.prompts import KINDS
from ..host.comfyui.inputs import (
    concept_problem,
    draw_contact_sheet,
    folder_fingerprint,
    folders_advice,
    look_through,
    training_concept,
)
from ..host.comfyui.jobs.prompts import running_graph
from ..host.comfyui.paths import NO_FOLDER, input_folders
from ..host.comfyui.settings import as_trained, training_of
from .training_inputs import view_inputs
from .types import CATEGORY, RegularizationSet, TrainingConcept, told


class CustomDiffusionConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CustomDiffusionConcept",
            display_name="Custom Diffusion Concept",
            category=CATEGORY,
            description="What to teach: 4 to 20 pictures of a subject or a style, and the words "
            "for it.",
            search_aliases=["dreambooth images", "training images", "instance images"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="4 to 20 pictures of the subject or style. Leave this unconnected to "
                    "use a folder instead.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per picture: only white (1) areas are learnt. Use masks "
                    "when the background must not be learnt.",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="One caption per picture. Where the trigger word is missing it is put "
                    "in. Leave this unconnected for 'photo of a <new1> cat'.",
                ),
                io.Combo.Input(
                    "folder",
                    options=input_folders(),
                    default=NO_FOLDER,
                    tooltip="Choosing pictures on this node fills a folder for you. Or take one in "
                    "ComfyUI's input or datasets folder. The first line of cat1.txt or "
                    "cat1.caption next to cat1.jpg is its caption, cat1.mask.png its mask.",
                ),
                io.String.Input(
                    "class_noun",
                    default="cat",
                    tooltip="The everyday word for the subject: cat, mug, chair. Use the one you "
                    "would write in a prompt.",
                ),
                io.String.Input(
                    "modifier_token",
                    display_name="trigger_word",
                    default="<new1>",
                    tooltip="The trigger word, in angle brackets; prompts then say '<new1> cat'. "
                    "Give every concept its own, or leave it empty to teach a kind of thing that "
                    "the model does not know.",
                ),
                io.Combo.Input(
                    "regularization_folder",
                    options=input_folders(),
                    default=NO_FOLDER,
                    tooltip="Usually none. If the trigger word is empty or gradient_cut is not own "
                    "words, choose about 200 ordinary pictures of the class: they keep other cats "
                    "from turning into yours.",
                ),
                RegularizationSet.Input(
                    "regularization_set",
                    optional=True,
                    tooltip="Regularization pictures from Draw or Retrieve Regularization Set, "
                    "instead of a folder.",
                ),
                io.String.Input(
                    "initializer",
                    default="",
                    advanced=True,
                    tooltip="A common word that the trigger word starts from. Leave it empty for "
                    "a rare one, as in the paper.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="thing",
                    tooltip="What the pictures have in common. Captions say 'photo of a <new1> "
                    "cat' for a thing, 'painting in the style of <new1> art' for a style, whose "
                    "class noun is art.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="How much this concept counts beside others that are trained with it. "
                    "Raise it for one that is learnt less well.",
                ),
                io.String.Input(
                    "picture_weights",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="How much each picture counts: one number per picture, or lines such "
                    "as 'cat1.jpg: 2'. 0 leaves a picture out. Leave it empty if all count alike.",
                ),
            ],
            outputs=[TrainingConcept.Output(display_name="training concept")],
        )

    @classmethod
    def validate_inputs(
        cls,
        folder: Any,
        class_noun: Any,
        modifier_token: Any,
        regularization_folder: Any,
        images: Any = None,
    ) -> bool | str:
        """Of what is connected there is a list with None."""
        problem = concept_problem(
            folder[0], class_noun[0], modifier_token[0], regularization_folder[0], bool(images)
        )
        return problem or True

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
        weight: Any = (1.0,),
        picture_weights: Any = ("",),
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
            weight=weight[0],
            picture_weights=picture_weights[0],
        )
        found, sheet = look_through(concept)
        warnings = [*folders_advice(folder[0], regularization_folder[0]), *found]
        words = f"{len(concept.images)} pictures, {len(concept.regularization)} regularization"
        if (often := sum(image.repeats for image in concept.images)) > len(concept.images):
            words += f"; with repeats the pictures count as {often}"
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
            "mirrored, with their captions. Dark areas are not learnt. It takes the settings of "
            "the Custom Diffusion Train that has the same concept.",
            search_aliases=["contact sheet", "dataset preview"],
            is_output_node=True,
            inputs=[
                TrainingConcept.Input(
                    "concept", tooltip="The Custom Diffusion Concept whose pictures to show."
                ),
                *view_inputs(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model to teach. Connect it where resolution is 0, to see the "
                    "resolution that follows it.",
                ),
                TrainingConcept.Input(
                    "together",
                    optional=True,
                    tooltip="Another concept of the same training. Connect it to see the pictures "
                    "that seg_mix makes of both.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            outputs=[io.Image.Output(display_name="contact sheet")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        return str(training_of(running_graph(), str(cls.hidden.unique_id)))

    @classmethod
    def execute(
        cls, concept: Any, model: Any = None, together: Any = None, **settings: Any
    ) -> io.NodeOutput:
        training = training_of(cls.hidden.prompt or {}, str(cls.hidden.unique_id))
        seen, config, lines = as_trained(concept, settings, training, model)
        sheet = draw_contact_sheet(seen, config, together)
        shown = told(*lines, **ui.PreviewImage(sheet, cls=cls).as_dict())
        return io.NodeOutput(sheet, ui=shown)


NODES = [CustomDiffusionConcept, CustomDiffusionViews]
