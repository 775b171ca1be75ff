"""The pack without ComfyUI: the command `custom-diffusion`, a file for each of its commands.

diffusers is imported when a command needs a model, so that `inspect` works without it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ..concept.errors import CustomDiffusionError
from . import (
    compression,
    demo,
    exchange,
    inspection,
    jobs,
    merging,
    regularization,
    sampling,
    training,
)

INTERRUPTED = 130  # exit status after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; errors that users can mend are one message and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except CustomDiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: files that were written are complete", file=sys.stderr)
        return INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="custom-diffusion", description="Teach Stable Diffusion concepts, and merge them."
    )
    commands = parser.add_subparsers(required=True)
    concepts = (merging, compression, inspection, exchange)
    for part in (demo, training, jobs, *concepts, sampling, regularization):
        part.add_to(commands)
    return parser
