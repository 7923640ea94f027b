"""Finds a model's files: a path, a run of train.py, or a name on Hugging Face."""

import functools
import os
import pathlib
import re

import huggingface_hub
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from models.untrusted import shortened

_NAME = re.compile(r"(?P<repository>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?", re.ASCII)
# What is read of a repository: no weights in other formats, and nothing in folders.
_READ = ("*.json", "*.safetensors", "*.jinja")
_UNREAD = ("*/*", "consolidated*")


def find_checkpoint(name: str | os.PathLike) -> pathlib.Path:
    """The GGUF file or the directory in the Hugging Face format that a model's name stands for.

    Args:
        name: a path of either, the directory of a run, whose `model/` is taken, or `org/name` or `org/name@revision` on
            Hugging Face, which is fetched into huggingface_hub's cache unless it is there. What exists as a path is
            taken as one.

    Raises:
        ValueError: in one line, if there is no such path and nothing of that name can be fetched; or if the run has
            written no model yet.
    """
    path = pathlib.Path(name)
    try:
        if path.is_dir():
            return _model_of_run(path)
        if path.exists():
            return path
    except OSError as error:  # too long a name, or a folder that may not be read
        raise ValueError(f"{shortened(name)} cannot be read: {error.strerror}") from error
    named = _NAME.fullmatch(str(name))
    if named is None or path.suffix == ".gguf":
        raise ValueError(
            f"{shortened(name)} is missing: expected a GGUF file, a directory with config.json and safetensors, a run "
            "of train.py, or a name on Hugging Face such as org/name"
        )
    return _fetched(named["repository"], named["revision"])


def _model_of_run(path: pathlib.Path) -> pathlib.Path:
    if any(path.glob("*.safetensors*")):
        return path
    if (path / "model" / "config.json").exists():
        return path / "model"
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").exists():
        raise ValueError(
            f"{path} is a run that has written no model yet, as it does at its end; go on with it by "
            f"python train.py --run-dir {path}"
        )
    return path


@functools.cache  # a program asks several times
def _fetched(repository: str, revision: str | None) -> pathlib.Path:
    try:
        directory = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(_READ), ignore_patterns=list(_UNREAD)
        )
    except GatedRepoError as error:
        reason, cause = "its owner must grant access first: ask on its page, then run `hf auth login`", error
    except RepositoryNotFoundError as error:
        reason, cause = "Hugging Face has no such repository, or it is private and wants `hf auth login`", error
    except RevisionNotFoundError as error:
        reason, cause = f"it has no revision {revision}", error
    except LocalEntryNotFoundError as error:
        reason, cause = "Hugging Face cannot be reached, and huggingface_hub's cache does not hold it", error
    except (OSError, ValueError, HTTPError, RevisionResolutionError, CachedRepoTreeNotFoundError) as error:
        reason, cause = f"it cannot be fetched ({shortened(error)})", error
    else:
        return pathlib.Path(directory)
    whole = repository if revision is None else f"{repository}@{revision}"
    raise ValueError(f"{whole} is no path here, and as a model on Hugging Face: {reason}") from cause
