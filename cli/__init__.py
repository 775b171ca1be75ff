"""The pack without ComfyUI: the command `custom-diffusion`, a file for each of its commands.

diffusers is imported when a command needs a model, so that `inspect` works without it.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Sequence

from ..concept.errors import CustomDiffusionError
from . import (
    composing,
    compression,
    demo,
    distance,
    editing,
    evaluation,
    exchange,
    inspection,
    jobs,
    merging,
    regularization,
    sampling,
    training,
)
from .models import check_device
from .parsing import CommandParser, package_version

INTERRUPTED = 130  # exit status after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; errors that users can mend are one message and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what it cannot write
        sys.stdout.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    try:
        if "device" in options:
            check_device(options.device)
        options.command(options)
    except CustomDiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        what = " ".join(filter(None, (str(error.filename or ""), error.strerror or str(error))))
        advice = "Look at the name, the permissions and the disk."
        print(f"error: {CustomDiffusionError(f'{what}. {advice}')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: files that were written are complete", file=sys.stderr)
        return INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="custom-diffusion", description="Teach Stable Diffusion concepts, and merge them."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {package_version()}")
    commands = parser.add_subparsers(required=True)
    concepts = (merging, distance, editing, compression, inspection, exchange)
    for part in (demo, training, jobs, *concepts, sampling, evaluation, regularization, composing):
        part.add_to(commands)
    return parser
