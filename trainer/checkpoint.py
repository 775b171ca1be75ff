"""What a training run needs to go on as if it had never stopped, and its file.

Everything random of a step follows from the seed and the step's number, and what does not learn
is made again from the pictures and the model. So what is learning, the optimiser's state and the
losses are all there is to keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..concept.atomic import write_atomically
from ..concept.errors import CheckpointError, ConceptFileError
from ..concept.tensors import read_tensors

FORMAT = "custom-diffusion-checkpoint"
FORMAT_VERSION = "1"
_PARAMETER, _LOSSES, _VALIDATION, _BEST = "parameter", "losses", "validation", "best"
_NUMBERS = "numbers"
FOUND = frozenset(
    {
        *("d", "d_max", "d_hat", "d_numerator", "d_denom"),  # Prodigy's
        *("k", "weight_sum", "lr_max", "scheduled_lr"),  # both, and schedule-free's
    }
)
"""What an optimiser finds out on its way, beside its tensors: numbers in its groups"""


@dataclass
class Checkpoint:
    """A run after so many steps."""

    losses: tuple[float, ...]
    """One a step"""
    parameters: tuple[Tensor, ...]
    """What learns, in the order of the optimiser"""
    moments: tuple[Mapping[str, Tensor], ...]
    """The optimiser's state of each"""
    validation: Mapping[int, float] = field(default_factory=dict)
    """Losses on pictures that are kept back, by step"""
    best: tuple[Tensor, ...] = ()
    """What learns as it was where the last of them was lowest, where the run ends with that"""
    numbers: tuple[Mapping[str, float], ...] = ()
    """What the optimiser has found out beside its state, for each of its groups"""

    @property
    def step(self) -> int:
        return len(self.losses)

    @staticmethod
    def of(
        optimizer: torch.optim.Optimizer,
        losses: Sequence[float],
        validation: Mapping[int, float] | None = None,
        best: tuple[Tensor, ...] = (),
    ) -> Checkpoint:
        """The tensors are the optimiser's own."""
        parameters = _parameters(optimizer)
        return Checkpoint(
            losses=tuple(losses),
            parameters=tuple(parameter.detach() for parameter in parameters),
            moments=tuple(
                {name: torch.as_tensor(value) for name, value in optimizer.state[p].items()}
                if p in optimizer.state
                else {}
                for p in parameters
            ),
            numbers=tuple(
                {name: float(group[name]) for name in sorted(FOUND & group.keys())}
                for group in optimizer.param_groups
            ),
            validation=dict(validation or {}),
            best=best,
        )

    def restore(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """Puts everything back where it was, and returns the losses until then.

        Afterwards only the losses are left here: whoever began the run still holds the checkpoint,
        and it is as large as what learns. Raises CheckpointError when something else learns now
        than did then.
        """
        parameters = _parameters(optimizer)
        then, now = ([tuple(p.shape) for p in all_] for all_ in (self.parameters, parameters))
        if then != now:
            raise CheckpointError(
                f"The checkpoint after step {self.step} holds parameters of the shapes {then}; "
                f"this training has {now}. Train from nothing, or with the settings it was made "
                f"with."
            )
        with torch.no_grad():
            for parameter, value in zip(parameters, self.parameters, strict=True):
                parameter.copy_(value)
        state = {
            index: {name: _number_or_tensor(value) for name, value in moments.items()}
            for index, moments in enumerate(self.moments)
            if moments
        }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for group, numbers in zip(optimizer.param_groups, self.numbers, strict=False):
            group.update({k: int(v) if k == "k" else v for k, v in numbers.items()})
        self.parameters, self.moments = (), ()
        return list(self.losses)


def write_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """The file is complete or absent. Raises ConceptFileError when it cannot be written."""
    tensors = {_LOSSES: torch.tensor(checkpoint.losses, dtype=torch.float64)}
    if checkpoint.validation:
        pairs = list(checkpoint.validation.items())
        tensors[_VALIDATION] = torch.tensor(pairs, dtype=torch.float64)
    for index, numbers in enumerate(checkpoint.numbers):
        if numbers:
            values = torch.tensor(list(numbers.values()), dtype=torch.float64)
            tensors[f"{_NUMBERS}.{index}"] = values
    tensors |= {f"{_BEST}.{index}": tensor for index, tensor in enumerate(checkpoint.best)}
    places: set[int] = set()
    for index, (parameter, moments) in enumerate(
        zip(checkpoint.parameters, checkpoint.moments, strict=True)
    ):
        for name, tensor in {_PARAMETER: parameter, **moments}.items():
            content = tensor.detach().cpu().contiguous()
            # The 8-bit optimiser's quantisation maps are one tensor for all parameters, and a file
            # holds no tensor twice.
            if content.untyped_storage().data_ptr() in places:
                content = content.clone()
            places.add(content.untyped_storage().data_ptr())
            tensors[f"{name}.{index}"] = content
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "parameters": str(len(checkpoint.parameters)),
    }
    if any(checkpoint.numbers):
        metadata[_NUMBERS] = " ".join(checkpoint.numbers[0])
    metadata["digest"] = _digest(metadata, tensors)
    write_atomically(
        path,
        lambda temporary: save_file(tensors, temporary, metadata),
        expected_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointError unless every byte is as it was written.

    The file is closed, and no tensor maps it: Windows removes no file that is mapped.
    """
    try:
        tensors, metadata = read_tensors(path)
    except ConceptFileError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read ({error}).") from error
    if (metadata.get("format"), metadata.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} is no checkpoint that this version of the pack reads: its format is "
            f"{metadata.get('format')!r}, {metadata.get('format_version')!r}; needed: {FORMAT!r}, "
            f"{FORMAT_VERSION!r}."
        )
    try:
        if metadata.pop("digest", "") == _digest(metadata, tensors):
            return _checkpoint_of(metadata, tensors)
        reason: object = "its content is not what was written"
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"The checkpoint {path} is damaged: {reason}.")


def _checkpoint_of(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Raises LookupError, ValueError or TypeError where a part is missing or makes no sense."""
    losses = tensors[_LOSSES]
    if losses.dtype != torch.float64 or losses.ndim != 1:
        raise TypeError(f"the losses are {losses.dtype} {tuple(losses.shape)}")
    if not losses.float().isfinite().all():
        raise ValueError("a loss is not finite")
    count = int(metadata["parameters"])
    if not 0 <= count < len(tensors):
        raise ValueError(f"it has {len(tensors)} tensors for {count} parameters")
    states: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        part, _, index = name.rpartition(".")
        if part:
            states[int(index)][part] = tensor
    best = [state.pop(_BEST) for state in states if _BEST in state]
    numbers = [state.pop(_NUMBERS) for state in states if _NUMBERS in state]
    if len(best) not in (0, count):
        raise ValueError(f"it has the best of {len(best)} of {count} parameters")
    return Checkpoint(
        losses=tuple(losses.tolist()),
        parameters=tuple(state.pop(_PARAMETER) for state in states),
        moments=tuple(states),
        validation=_measured(tensors.get(_VALIDATION), len(losses)),
        best=tuple(best),
        numbers=_found(metadata.get(_NUMBERS, "").split(), numbers),
    )


def _found(names: Sequence[str], groups: Sequence[Tensor]) -> tuple[Mapping[str, float], ...]:
    """Raises ValueError or TypeError for what no optimiser finds out."""
    if bool(names) != bool(groups) or not FOUND.issuperset(names):
        raise ValueError(f"its optimiser's numbers are {names}")
    for values in groups:
        if values.dtype != torch.float64 or values.shape != (len(names),):
            raise TypeError(f"its numbers are {values.dtype} {tuple(values.shape)}")
        if not values.isfinite().all():
            raise ValueError("a number of its optimiser is not finite")
    return tuple(dict(zip(names, values.tolist(), strict=True)) for values in groups)


def _measured(validation: Tensor | None, steps: int) -> dict[int, float]:
    """Raises TypeError or ValueError for what was not measured within so many steps."""
    if validation is None:
        return {}
    if validation.dtype != torch.float64 or validation.ndim != 2 or validation.shape[1] != 2:
        raise TypeError(f"what was measured is {validation.dtype} {tuple(validation.shape)}")
    measured = {int(step): loss for step, loss in validation.tolist()}
    if not validation.float().isfinite().all() or not all(0 < step <= steps for step in measured):
        raise ValueError("a measured loss is not finite, or of no step")
    return measured


def _number_or_tensor(value: Tensor) -> Tensor | int:
    """Some optimisers count their steps in a plain number, which is stored as a tensor."""
    plain = value.ndim == 0 and value.dtype == torch.int64
    return int(value) if plain else value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of all that is said, and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
