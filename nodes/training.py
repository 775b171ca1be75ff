"""Teaching a concept: what to teach, and the training itself."""

from typing import get_args

from comfy_api.latest import io, ui

from ..host.comfyui.inputs import (
    KINDS,
    draw_contact_sheet,
    draw_picture_sheet,
    folder_fingerprint,
    training_concept,
)
from ..host.comfyui.jobs import jobs_to_go_on_with, tell_node
from ..host.comfyui.paths import NO_FOLDER, input_folders
from ..host.comfyui.training import start_training, training_outputs
from ..trainer.advice import advice
from ..trainer.config import Fit, GradientCut, MethodName, OptimizerName, TrainConfig
from ..trainer.methods import METHODS, recipe
from .types import CATEGORY, Concept, RegularizationSet, TrainingConcept, told

DEFAULTS = TrainConfig()
CHECKPOINT_EVERY_STEPS = 50
MOST_CONCEPTS = 8


def _resolution() -> io.Int.Input:
    return io.Int.Input(
        "resolution",
        default=DEFAULTS.resolution,
        min=64,
        max=2048,
        step=8,
        tooltip="512 for SD 1.x and 2.x base, 768 for SD 2.1 768, 1024 for SDXL.",
    )


def _seed() -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False)


def _method_inputs(name: MethodName) -> list[io.Input]:
    """What a method has settings of its own for."""
    defaults = recipe(name)
    inputs = [
        io.Int.Input("steps", default=defaults.steps, min=1, max=100_000),
        io.Float.Input(
            "learning_rate",
            default=defaults.learning_rate,
            min=1e-7,
            max=0.1,
            step=1e-6,
            round=False,
        ),
    ]
    if name == "low-rank":
        inputs.append(io.Int.Input("rank", default=defaults.rank, min=1, max=320))
    return inputs


def _view_inputs() -> list[io.Input]:
    """How views are made of pictures: the same for the training and for what shows them."""
    return [
        io.Boolean.Input(
            "augment",
            default=DEFAULTS.augment,
            advanced=True,
            tooltip="Random sizes with words that say so, as in the paper.",
        ),
        io.Boolean.Input(
            "flip",
            default=DEFAULTS.flip,
            advanced=True,
            tooltip="Mirror half of the pictures. Off for writing and faces.",
        ),
        io.Combo.Input(
            "fit",
            options=list(get_args(Fit)),
            default=DEFAULTS.fit,
            advanced=True,
            tooltip="Pictures that are not square: crop to the middle, or letterbox: all of them, "
            "between grey bars that do not count.",
        ),
    ]


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
                    "are connected. A .txt file beside a picture is its caption, a .mask.png file "
                    "its mask.",
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
                    tooltip="About 200 ordinary pictures of the class, which keep the model from "
                    "drifting. A .txt file beside a picture is its caption.",
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
        folder,
        class_noun,
        modifier_token,
        regularization_folder,
        initializer,
        kind,
        images=None,
        masks=None,
        captions=None,
        regularization_set=None,
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
        sheet = draw_picture_sheet(concept)
        words = f"{len(concept.images)} pictures, {len(concept.regularization)} regularization"
        shown = told(words, warnings=advice(concept), **ui.PreviewImage(sheet, cls=cls).as_dict())
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
            inputs=[TrainingConcept.Input("concept"), _resolution(), _seed(), *_view_inputs()],
            outputs=[io.Image.Output(display_name="contact sheet")],
        )

    @classmethod
    def execute(cls, concept, **settings) -> io.NodeOutput:
        sheet = draw_contact_sheet(concept, TrainConfig(**settings))
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


class CustomDiffusionTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CustomDiffusionTrain",
            display_name="Custom Diffusion Train",
            category=CATEGORY,
            description="Teaches the model concepts on a thread of its own, and saves them in "
            "models/custom_diffusion. Interrupting saves what was learnt so far.",
            search_aliases=["train", "finetune", "dreambooth", "textual inversion"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD 1.x, SD 2.x or SDXL. It is copied, never changed."
                ),
                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint."),
                io.Vae.Input("vae"),
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(
                        TrainingConcept.Input("concept"), prefix="concept", min=1, max=MOST_CONCEPTS
                    ),
                ),
                io.String.Input(
                    "name", default="my-concept", tooltip="Name of the concept's file."
                ),
                io.DynamicCombo.Input(
                    "method",
                    options=[
                        io.DynamicCombo.Option(name, _method_inputs(name)) for name in METHODS
                    ],
                    tooltip=". ".join(
                        f"{name}: {method.description}" for name, method in METHODS.items()
                    ),
                ),
                io.Int.Input(
                    "batch_size",
                    default=DEFAULTS.batch_size,
                    min=1,
                    max=256,
                    tooltip="Pictures a step; half of them regularization, when there are any.",
                ),
                _resolution(),
                _seed(),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    label_on="until trained",
                    label_off="no, in the background",
                    tooltip="Wait, and hand the concept on; or return at once with the job's id.",
                ),
                *_view_inputs(),
                Concept.Input(
                    "start",
                    optional=True,
                    tooltip="A concept of this model to go on from: with the same modifier token "
                    "its training continues, with another one more is learnt on top of it.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=DEFAULTS.prior_weight,
                    min=0,
                    max=10,
                    step=0.1,
                    advanced=True,
                    tooltip="Weight of the regularization pictures.",
                ),
                io.Combo.Input(
                    "gradient_cut",
                    options=list(get_args(GradientCut)),
                    default=DEFAULTS.gradient_cut,
                    advanced=True,
                    tooltip="Positions of the prompt whose keys and values pass no gradient: the "
                    "start token as in the paper's code, and the padding after the last word, "
                    "through which a merge would lose what was learnt.",
                ),
                io.Int.Input(
                    "micro_batch_size",
                    default=DEFAULTS.micro_batch_size,
                    min=0,
                    max=256,
                    advanced=True,
                    tooltip="Pictures computed at once, a part of the batch; 0 is all of it. It "
                    "becomes less by itself when memory runs out.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=DEFAULTS.gradient_checkpointing,
                    advanced=True,
                    tooltip="Needs less memory and more time. It is turned on by itself when one "
                    "picture at once is still too much.",
                ),
                io.Int.Input(
                    "preview_every_steps",
                    default=DEFAULTS.preview_every_steps,
                    min=0,
                    max=10_000,
                    advanced=True,
                    tooltip="A picture of '<new1> cat' is drawn this often; 0 draws none.",
                ),
                io.Int.Input(
                    "checkpoint_every_steps",
                    default=CHECKPOINT_EVERY_STEPS,
                    min=1,
                    max=10_000,
                    advanced=True,
                    tooltip="After so many steps the training is written to disk. A crash costs no "
                    "more than the steps since: queue the same graph again, and it goes on.",
                ),
                io.Boolean.Input(
                    "share_device",
                    default=False,
                    advanced=True,
                    label_on="trains while prompts run",
                    label_off="prompts go first",
                    tooltip="Prompts go first: between two steps the training waits until they are "
                    "done. Or both at once, both slower.",
                ),
                io.Boolean.Input(
                    "keep_on_interrupt",
                    default=False,
                    advanced=True,
                    label_on="goes on in the background",
                    label_off="stops and saves",
                    tooltip="What the training does when you interrupt the prompt that waits.",
                ),
                io.Int.Input(
                    "keep_best",
                    default=1,
                    min=1,
                    max=100,
                    advanced=True,
                    tooltip="So many concepts of the run are kept in its folder beside the newest: "
                    "those before which the losses were lowest.",
                ),
                # Optional, and last: graphs that were saved before there was a choice still run.
                io.Combo.Input(
                    "optimizer",
                    options=list(get_args(OptimizerName)),
                    default=DEFAULTS.optimizer,
                    optional=True,
                    advanced=True,
                    tooltip="8-bit: the optimiser's state in a quarter of the memory. It needs "
                    "the Python package bitsandbytes.",
                ),
                io.Boolean.Input(
                    "text_encoder_on_cpu",
                    default=DEFAULTS.text_encoder_on_cpu,
                    optional=True,
                    advanced=True,
                    tooltip="Leaves the text encoders in main memory: less GPU memory, slower "
                    "steps. For SDXL on small GPUs.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            outputs=[
                Concept.Output(display_name="concept"),
                io.LossMap.Output(display_name="loss map"),
                io.String.Output(display_name="job id"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        return jobs_to_go_on_with(bool(inputs.get("wait")))

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        concepts,
        name,
        method,
        wait,
        checkpoint_every_steps,
        share_device,
        keep_on_interrupt,
        keep_best,
        start=None,
        **settings,
    ) -> io.NodeOutput:
        node_id = str(cls.hidden.unique_id)
        job = start_training(
            name,
            model,
            clip,
            vae,
            list(concepts.values()),
            TrainConfig(**method, **settings),
            start,
            checkpoint_every_steps=checkpoint_every_steps,
            share_device=share_device,
            keep_best=keep_best,
            prompt=cls.hidden.prompt or {},
            node_id=node_id,
        )
        tell_node(node_id, job)
        return io.NodeOutput(*training_outputs(job, wait, keep_on_interrupt))


NODES = [CustomDiffusionConcept, CustomDiffusionViews, CustomDiffusionTrain]
