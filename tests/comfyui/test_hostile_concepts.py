"""Files of strangers in models/custom_diffusion: the list over HTTP is JSON with the good ones."""

from __future__ import annotations

import json
import shutil

import pytest
from custom_diffusion.concept.file import write_concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.concept.plain import is_plain
from support.comfy_server import ComfyServer
from support.concepts import random_concept
from support.hostile import CARD, hostile_files

ROUTE = "/custom_diffusion/concepts"


def test_the_list_over_http(server: ComfyServer) -> None:
    folder = server.models / "custom_diffusion" / "hostile"
    folder.mkdir(parents=True)
    try:
        files = hostile_files()
        for file in files:
            file.write(folder / file.name)
        for name in ("good-1", "good-2"):
            concept = random_concept(family=FAMILIES["sd15"])
            write_concept(concept, folder / f"{name}.safetensors")
        answer = server.get_bytes(ROUTE).decode()
        assert is_plain(answer)
        listing = json.loads(answer, parse_constant=pytest.fail)
        names = {card["name"] for card in listing["concepts"]}
        assert {f"hostile/good-{number}.safetensors" for number in (1, 2)} <= names
        # ComfyUI lists neither folders nor links to nowhere as files.
        refused = [file for file in files if file.reason != CARD]
        assert len(listing["unreadable"]) >= len(refused) - 4
        assert server.get(f"{ROUTE}/hostile/good-1.safetensors")["prompts"] == ["<new1> cat"]
    finally:
        shutil.rmtree(folder)
