"""Where ComfyUI keeps what the pack reads and writes."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...concept.errors import DataError, IncompatibleModelError, UnknownConceptError
from ...formats.content import ENDINGS

MODEL_FOLDER = "custom_diffusion"
JOBS_FOLDER = "custom_diffusion_jobs"
NO_FOLDER = NO_FILE = "none"
DATASETS = " [datasets]"
"""Ends the names of folders that do not lie below `input/`, as ComfyUI writes it for files"""
_TEXT_MODELS = "text_encoders"


def register_model_folder() -> None:
    """Makes `models/custom_diffusion` known, beside what extra_model_paths.yaml says."""
    default = Path(folder_paths.models_dir) / MODEL_FOLDER
    folder_paths.add_model_folder_path(MODEL_FOLDER, str(default))
    paths, extensions = folder_paths.folder_names_and_paths[MODEL_FOLDER]
    folder_paths.folder_names_and_paths[MODEL_FOLDER] = (paths, {*extensions, *ENDINGS})


def concept_folder() -> Path:
    """Where new concepts are saved."""
    return Path(folder_paths.get_folder_paths(MODEL_FOLDER)[0])


def network_folder() -> Path:
    """Where whole UNets are saved, for ComfyUI's own loader of diffusion models."""
    return Path(folder_paths.models_dir) / "diffusion_models"


def export_folder(kind: str) -> Path:
    """Where an exported format is of use: ComfyUI's own loaders look for LoRAs and embeddings in
    folders of theirs; what other programs read goes to the output folder.
    """
    own = {"comfyui-lora": "loras", "kohya-lora": "loras", "embeddings": "embeddings"}.get(kind)
    if own:
        return Path(folder_paths.get_folder_paths(own)[0])
    return Path(folder_paths.get_output_directory()) / MODEL_FOLDER / "exported"


def concept_files() -> list[str]:
    """Names of the concepts that can be loaded."""
    return folder_paths.get_filename_list(MODEL_FOLDER)  # type: ignore[no-any-return]


def concept_path(name: str) -> Path:
    path = folder_paths.get_full_path(MODEL_FOLDER, name)
    if path is None:
        raise _no_concept(name)
    return Path(path)


def listed_concept_path(name: str) -> Path:
    """Of one of `concept_files`, which are to be changed: not of whatever else lies there."""
    if name not in concept_files():
        raise _no_concept(name)
    return concept_path(name)


def _no_concept(name: str) -> UnknownConceptError:
    folders = ", ".join(folder_paths.get_folder_paths(MODEL_FOLDER))
    return UnknownConceptError(
        f"There is no concept {name!r} in {folders}. Train and save one, or copy the file "
        "there and press R to refresh the list."
    )


def clip_weight_files() -> list[str]:
    """Files of weights in `models/text_encoders` and `models/clip`, for a drop-down; first none."""
    files = folder_paths.get_filename_list(_TEXT_MODELS)
    return [NO_FILE, *(name for name in files if name.endswith(".safetensors"))]


def clip_weights_path(name: str) -> Path:
    """Raises IncompatibleModelError unless the name is one of `clip_weight_files`."""
    if name == NO_FILE or name not in clip_weight_files():
        chosen = "No CLIP weights are chosen" if name == NO_FILE else f"There are no {name[:100]!r}"
        raise IncompatibleModelError(
            f"{chosen} in ComfyUI's models folder. Put open_clip_model.safetensors of the CLIP "
            f"model (for ViT-B-32-quickgelu that of 'openai') into models/text_encoders, press R, "
            f"and choose it. Nothing is downloaded."
        )
    return Path(folder_paths.get_full_path(_TEXT_MODELS, name))


def input_folders() -> list[str]:
    """Folders of pictures, for a drop-down: first the choice of none, then those below `input/`,
    then those in ComfyUI's folders of data sets, where this ComfyUI has such; none that is hidden.
    """
    own = [name for name in folder_paths.get_input_subfolders() if not _is_hidden(name)]
    return [NO_FOLDER, *sorted(own), *sorted(_dataset_folders())]


def input_folder(name: str) -> Path:
    """The folder below `input/`, or of a data set; names that lead outside are refused."""
    name = str(name)  # a graph that a program sends may hold whatever it likes
    if name.endswith(DATASETS):
        if name not in _dataset_folders():
            raise DataError(f"There is no folder {name!r} in ComfyUI's folder of data sets.")
        return _dataset_folders()[name]
    root = Path(os.path.abspath(folder_paths.get_input_directory()))
    path = Path(os.path.abspath(root / name))  # links that the user put there may lead outside
    if not path.is_relative_to(root):
        raise DataError(
            f"The folder {name!r} is outside ComfyUI's input folder {root}. Move it there."
        )
    return path


def _dataset_folders() -> dict[str, Path]:
    """Name in a drop-down → folder. ComfyUI has folders of data sets since 0.30."""
    roots, _ = folder_paths.folder_names_and_paths.get("datasets", ((), set()))
    found: dict[str, Path] = {}
    for root in roots:
        for place, _, _ in os.walk(root):
            name = Path(os.path.relpath(place, root)).as_posix()
            if name != "." and not _is_hidden(name):
                found.setdefault(f"{name}{DATASETS}", Path(place))
    return found


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def jobs_folder() -> Path:
    """Where trainings are kept: the first `custom_diffusion_jobs` of extra_model_paths.yaml, else
    below `output/`. No setting of the page: who can reach it could then have files written, and
    deleted, anywhere.
    """
    chosen, _ = folder_paths.folder_names_and_paths.get(JOBS_FOLDER, ((), set()))
    default = Path(folder_paths.get_output_directory()) / MODEL_FOLDER / "jobs"
    return Path(chosen[0]) if chosen else default


def regularization_folder() -> Path:
    """Where the pictures lie that the model draws for a regularization set."""
    return Path(folder_paths.get_output_directory()) / MODEL_FOLDER / "regularization"


def cache_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / MODEL_FOLDER / "cache"
