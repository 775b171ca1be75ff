"""How good a concept is."""

from typing import Any

from comfy_api.latest import io

from ..evaluation.prompts import PROMPTS
from ..host.comfyui.drawing import Sampling
from ..host.comfyui.evaluation import APPLIED, ROUTED, evaluate
from ..host.comfyui.inputs import folder_fingerprint
from ..host.comfyui.paths import NO_FOLDER, input_folders
from .sampling_inputs import sampling_inputs
from .types import CATEGORY, MOST_CONCEPTS, Concept, TrainingConcept, told


class EvaluateConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EvaluateConcept",
            display_name="Evaluate Concept",
            category=CATEGORY,
            description="Draws prompts with a concept and without, and measures how well the "
            "pictures follow the prompts and look like yours. Interrupting keeps what is drawn.",
            search_aliases=["score concept", "compare strengths", "clip score", "test concept"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint, straight from its loader."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                Concept.Input("concept", tooltip="The concept to evaluate. It is not changed."),
                io.Combo.Input(
                    "reference_folder",
                    options=input_folders(),
                    default=NO_FOLDER,
                    tooltip="A folder in ComfyUI's input folder with pictures of the concept to "
                    "compare with. Best are some that it was not trained on.",
                ),
                io.Combo.Input(
                    "class_folder",
                    options=input_folders(),
                    default=NO_FOLDER,
                    advanced=True,
                    tooltip="A folder of real pictures of the class, other cats for one, 50 or "
                    "more. With it you see how far the bare class has moved (KID).",
                ),
                io.String.Input(
                    "prompts",
                    default="\n".join(PROMPTS),
                    multiline=True,
                    tooltip="One prompt per line. Write {} where the concept belongs. Leave it "
                    "empty for twenty prompts of our own.",
                ),
                io.String.Input(
                    "strengths",
                    default="1.0",
                    tooltip="The strengths to compare, such as 0.6, 0.8, 1. The base model is "
                    "always drawn too.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1_000_001,
                    control_after_generate=False,
                    tooltip="The first seed. Every strength draws from the same noise.",
                ),
                io.Int.Input(
                    "pictures_per_prompt",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="Pictures of each prompt at each strength. The paper draws 50; raise "
                    "it later, and only the new ones are drawn.",
                ),
                *sampling_inputs("Use the one you draw with."),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=256,
                    advanced=True,
                    tooltip="How many pictures are drawn at once. Lower it if memory runs out.",
                ),
                io.Image.Input(
                    "references",
                    optional=True,
                    tooltip="Pictures of the concept to compare with, instead of a folder.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="What compares pictures, from Load CLIP Vision: a CLIP or DINOv2. "
                    "Without it you get the sheet alone.",
                ),
                io.Clip.Input(
                    "judge_clip",
                    optional=True,
                    advanced=True,
                    tooltip="The text half of the same CLIP as clip_vision, from Load CLIP "
                    "(clip_l.safetensors for ViT-L/14), to measure how prompts are followed.",
                ),
                io.Combo.Input(
                    "use",
                    options=[APPLIED, ROUTED],
                    default=APPLIED,
                    optional=True,
                    advanced=True,
                    tooltip="How the concept acts: added to the weights as by Apply Concept, or at "
                    "its own words alone as by Route Concepts. Choose how you draw with it.",
                ),
                io.Autogrow.Input(
                    "more_concepts",
                    template=io.Autogrow.TemplatePrefix(
                        Concept.Input(
                            "more_concept",
                            tooltip="Another concept in the same pictures. Set use to routed.",
                        ),
                        prefix="more_concept",
                        min=0,
                        max=MOST_CONCEPTS - 1,
                    ),
                    tooltip="Concepts to draw in the same pictures, each at its own words.",
                ),
                io.Autogrow.Input(
                    "subjects",
                    template=io.Autogrow.TemplatePrefix(
                        TrainingConcept.Input(
                            "subject",
                            tooltip="A Custom Diffusion Concept with reference pictures and the "
                            "trigger word that they belong to.",
                        ),
                        prefix="subject",
                        min=0,
                        max=MOST_CONCEPTS,
                    ),
                    tooltip="References of each trigger word of a merge or of several concepts, "
                    "instead of one folder. With two or more each subject is looked for in the "
                    "pictures and compared with all.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="plot"),
                io.Image.Output(display_name="sheet"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, reference_folder: Any, class_folder: Any, **inputs: object) -> str:
        return folder_fingerprint(reference_folder, class_folder)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        concept: Any,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        resolution: int,
        references: Any = None,
        use: str = APPLIED,
        more_concepts: Any = None,
        subjects: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        sampling = Sampling(steps, cfg, sampler_name, scheduler, resolution)
        found = evaluate(
            model,
            clip,
            vae,
            [concept, *_connected(more_concepts)],
            sampling,
            routed=use == ROUTED,
            subjects=_connected(subjects),
            references=references,
            **settings,
        )
        shown = told(*found.lines, warnings=found.warnings, table=found.table)
        return io.NodeOutput(shown["text"][0], found.plot, found.sheet, ui=shown)


def _connected(sockets: Any) -> list[Any]:
    """What is in those of an Autogrow input."""
    return [one for one in (sockets or {}).values() if one is not None]


NODES = [EvaluateConcept]
