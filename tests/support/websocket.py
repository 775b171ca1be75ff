"""Listening to what a ComfyUI server tells its browsers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import ClientSession, WSMsgType

from .comfy_server import ComfyServer


def watch(server: ComfyServer, queue: Callable[[str], Any]) -> list[dict[str, Any] | bytes]:
    """Everything the websocket says until the prompt that `queue` posts has ended."""
    messages: list[dict[str, Any] | bytes] = []

    async def listen() -> None:
        url = f"{server.url.replace('http', 'ws')}/ws?clientId=watcher"
        async with ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            threading.Thread(target=queue, args=("watcher",)).start()
            async for message in socket:
                binary = message.type is WSMsgType.BINARY
                messages.append(message.data if binary else json.loads(message.data))
                last = messages[-1]
                if isinstance(last, dict) and last["type"] in (
                    "execution_success",
                    "execution_error",
                ):
                    return

    asyncio.run(asyncio.wait_for(listen(), 120))
    return messages
