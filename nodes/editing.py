"""Editing what words mean, in closed form."""

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..concept.errors import MergeError
from ..host.comfyui.editing import edit_in_comfyui, lock_keys_in_comfyui
from ..host.comfyui.inputs import captions_fingerprint
from ..merge.edits import Edit, read_amounts, read_words
from .merging import captions_input
from .types import CATEGORY, Concept, told, without_leftovers

_OPERATIONS: dict[str, list[io.Input]] = {
    "erase": [],
    "moderate": [
        io.Float.Input(
            "share",
            default=0.5,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="How much of the words' meaning goes. 1 erases them.",
        ),
    ],
    "replace": [
        io.String.Input(
            "into",
            default="",
            tooltip="The word or phrase that all of the words mean from now on.",
        ),
    ],
    "debias": [
        io.String.Input(
            "attributes",
            default="",
            multiline=True,
            tooltip="What to draw more often and what less, each with an amount: woman: 0.3, man: "
            "-0.3. Start with the share that you want less the share that you see.",
        ),
    ],
    "restore": [
        io.Float.Input(
            "amount",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much of the words' meaning comes back from earlier_edit. 1 gives them "
            "back exactly.",
        ),
    ],
}


class EditConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditConcepts",
            display_name="Edit Concepts",
            category=CATEGORY,
            description="Erases, weakens, replaces or debiases words that the model knows, without "
            "training. The result is a concept: apply it to the model.",
            search_aliases=["erase concept", "unlearn", "uce", "debias", "remove concept"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model whose words you edit, straight from its loader. It is not "
                    "changed.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="The words or phrases to edit, with commas between them: square, old "
                    "car.",
                ),
                io.DynamicCombo.Input(
                    "operation",
                    options=[
                        io.DynamicCombo.Option(name, inputs) for name, inputs in _OPERATIONS.items()
                    ],
                    tooltip="What to do with the words. For several operations at once, put Edit "
                    "Concepts nodes in a row through earlier_edit.",
                ),
                io.String.Input(
                    "preserve",
                    default="",
                    multiline=True,
                    tooltip="Words that must stay exactly as they are, with commas between them. "
                    "Take those that the report warns of.",
                ),
                Concept.Input(
                    "earlier_edit",
                    optional=True,
                    tooltip="What another Edit Concepts node made of the same model. Its edits are "
                    "solved again together with these; restore needs it.",
                ),
                io.Float.Input(
                    "softness",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    advanced=True,
                    tooltip="0 does exactly what you ask. Raise it, 0.01 for one, if other words "
                    "move too much: all words then give way a little.",
                ),
                captions_input("What the edited model must keep drawing as before."),
            ],
            outputs=[
                Concept.Output(display_name="concept"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, regularization_captions: str, **inputs: object) -> str:
        return captions_fingerprint(regularization_captions)

    @classmethod
    @without_leftovers
    def execute(
        cls,
        model: Any,
        clip: Any,
        words: str,
        operation: Any,
        preserve: str,
        softness: float,
        regularization_captions: str,
        earlier_edit: Any = None,
    ) -> io.NodeOutput:
        edits, restore = _asked(read_words(words), operation)
        concept, report = edit_in_comfyui(
            model,
            clip,
            edits,
            earlier=earlier_edit,
            restore=restore,
            preserved=read_words(preserve),
            softness=softness,
            captions=regularization_captions,
        )
        said = told(
            report.verdict(),
            f"details: {report.details()}",
            warnings=report.warnings(),
            table=report.table(),
        )
        return io.NodeOutput(concept, report.text(), ui=said)


def _asked(words: Sequence[str], operation: Any) -> tuple[list[Edit], dict[str, float]]:
    """The edits that the node asks for, and what it restores."""
    kind = operation["operation"]
    if not words:
        raise MergeError(f"There is no word to {kind}. Write one or more, with commas between.")
    if kind == "restore":
        return [], dict.fromkeys(words, operation["amount"])
    if kind == "debias":
        amounts = read_amounts(operation["attributes"])
        return [Edit(word, attributes=amounts) for word in words], {}
    into = " ".join(operation.get("into", "").split())
    if kind == "replace" and not into:
        raise MergeError(f"'{words[0]}' is replaced by nothing. Write a word into 'into'.")
    return [Edit(word, into, operation.get("share", 1.0)) for word in words], {}


class LockConceptKeys(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LockConceptKeys",
            display_name="Lock Concept Keys",
            category=CATEGORY,
            description="Lets a concept's words look where its class noun looks, and keeps what "
            "they bring. Try it when a concept takes over the picture or mixes with others.",
            search_aliases=["key locking", "perfusion", "key lock"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The checkpoint that the concept was trained on, straight from its "
                    "loader. It is not changed.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of the same checkpoint, without concepts.",
                ),
                Concept.Input(
                    "concept",
                    tooltip="A concept with a trigger word and a class noun. It is not changed.",
                ),
                captions_input("What the model must keep looking at as before."),
            ],
            outputs=[Concept.Output(display_name="concept")],
        )

    @classmethod
    def fingerprint_inputs(cls, regularization_captions: str, **inputs: object) -> str:
        return captions_fingerprint(regularization_captions)

    @classmethod
    def execute(
        cls, model: Any, clip: Any, concept: Any, regularization_captions: str
    ) -> io.NodeOutput:
        locked, report = lock_keys_in_comfyui(model, clip, concept, regularization_captions)
        return io.NodeOutput(locked, ui=told(*report.summary()))


NODES = [EditConcepts, LockConceptKeys]
