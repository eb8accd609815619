"""Where weights come from: a local folder of safetensors, or a hub repository copied into one.

Nothing is ever unpickled and no code is fetched: only safetensors and JSON or text files are asked for.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mim_ray.errors import ArtifactError, ConfigError


def weights_folder(weights: str, own: str | None, files: Sequence[str], key: str) -> Path:
    """The local folder that a `weights` setting means.

    Args:
        weights: a local folder, `hub` for the repository `own` of the named model, or `hub:OWNER/NAME`.
        files: patterns of the files that are copied from the hub.
        key: the setting, for errors.

    Raises:
        ConfigError: `hub` where the model names no repository. ArtifactError: the hub cannot be reached.
    """
    if weights != "hub" and not weights.startswith("hub:"):
        return Path(weights)
    name = weights.partition(":")[2] or own
    if not name:
        raise ConfigError(
            f"{key} = 'hub', but the model names no hub repository. Give a local folder or hub:OWNER/NAME."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.strip("/"), allow_patterns=list(files)))
    except Exception as error:  # noqa: BLE001  network, permission, missing files: one sentence for all
        raise ArtifactError(
            f"the weights of {name} cannot be had from the hub ({str(error)[:200]}). Check the network, or copy the"
            f" folder here and set {key} to it."
        ) from None


def safetensors_file(folder: Path, names: Sequence[str] = ("model.safetensors",)) -> Path:
    """The safetensors file of a folder of weights: the first of `names` that is there, else the only one.

    Raises:
        ArtifactError: there is none (pickled weights are never loaded), or it is not clear which.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise ArtifactError(
        f"{folder} has no {names[0]} (found: {found or 'nothing'}). Give a local folder that holds the weights"
        " as safetensors; pickled .bin or .pth files are never loaded."
    )


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file.

    Raises:
        ArtifactError: it is no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ArtifactError(f"{file} is not valid JSON ({error}). Copy it again.") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"{file} holds no JSON object. Copy it again.")
    return values


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """ "did you mean …?" with the known names like this one, or another hint."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else otherwise
