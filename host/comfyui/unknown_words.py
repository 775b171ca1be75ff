"""Words in angle brackets that a prompt's CLIP does not know are told of, on the node that has the
prompt: CLIP reads them as ordinary text, and the picture lacks what they mean.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...concept.prompts import unknown_words

log = logging.getLogger("custom_diffusion")
_TEACHING = {"ApplyKVDelta", "RouteConcepts", "ApplyRegions", "CreateHookConcept"}
"""Nodes whose CLIP has learnt words: their tokenizers look for unknown ones themselves"""


def tell_of_unknown(text: str, known: Iterable[str]) -> None:
    """On the node that is executed, for a prompt of a CLIP that knows these words."""
    words = list(known)
    node_id = executing_node()
    for word in unknown_words(text, words):
        alike = [name for name in words if name.lower() == word.lower()]
        advice = f"Write {alike[0]}" if alike else "Apply the concept that has it"
        tell_node(
            node_id,
            f"{word} is no word of this CLIP, which knows {', '.join(words)}: it is read as "
            f"ordinary text. {advice}.",
        )


def watch_prompts(own_nodes: set[str]) -> None:
    """Tells of nodes with such words and a CLIP that no concept was applied to, as soon as a graph
    is queued. What the pack's own nodes are given is no prompt. Called once.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(partial(_look_through, own_nodes))


def _look_through(own_nodes: set[str], queued: dict[str, Any]) -> dict[str, Any]:
    graph = queued.get("prompt")
    graph = graph if isinstance(graph, dict) else {}
    for node_id, words in _without_concepts(graph):
        if graph[node_id].get("class_type") not in own_nodes:
            tell_node(
                node_id,
                f"{', '.join(words)}: no concept is applied to the CLIP of this prompt, so it is "
                f"read as ordinary text. Put the node Apply Concept before it.",
            )
    return queued


def _without_concepts(graph: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Nodes that have a CLIP and text with words of this kind, and no teaching node before them."""
    for node_id in graph:
        inputs = _inputs(graph, node_id)
        sources = [_inputs(graph, link[0]) for link in inputs.values() if _is_link(link)]
        own = [inputs, *(one for one in sources if not any(map(_is_link, one.values())))]
        texts = [text for one in own for text in one.values() if isinstance(text, str)]
        words = list(dict.fromkeys(word for text in texts for word in unknown_words(text, ())))
        if words and _is_link(inputs.get("clip")) and not _is_taught(graph, inputs["clip"][0]):
            yield node_id, words


def _is_taught(graph: Mapping[str, Any], node_id: str) -> bool:
    """Whether a teaching node is this one, or any that it depends on."""
    waiting, seen = [node_id], set()
    while waiting:
        key = waiting.pop()
        node = graph.get(key)
        if key in seen or not isinstance(node, dict):
            continue
        if node.get("class_type") in _TEACHING:
            return True
        seen.add(key)
        waiting += [link[0] for link in _inputs(graph, key).values() if _is_link(link)]
    return False


def _inputs(graph: Mapping[str, Any], node_id: Any) -> Mapping[str, Any]:
    node = graph.get(node_id)
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def executing_node() -> str:
    """The id of the node that is executed now; empty where none is."""
    context = get_executing_context()
    return context.node_id if context else ""


def tell_node(node_id: str, message: str) -> None:
    """In the log, and as the text below a node."""
    log.warning("%s", message)
    server = getattr(PromptServer, "instance", None)
    if server and node_id:
        server.send_progress_text(message, node_id)
