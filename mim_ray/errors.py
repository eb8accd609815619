"""Every error that a user of mim_ray can meet.

    MimRayError
    ├── ConfigError            a setting is unknown, of the wrong type or out of range (all problems at once)
    ├── DataError              a table or file cannot be used as a whole (single bad rows go to `rejects` instead)
    ├── ArtifactError          what a stage left is missing, damaged or of another architecture
    │   └── VersionMismatchError   embeddings and model belong to different encoder versions
    ├── StorageError           an object store cannot be reached, refuses, or lacks what commits need
    ├── TrainingError          training cannot go on
    │   └── NonFiniteLossError     the loss became NaN or infinite; the optimizer did not move
    ├── UnavailableError       parameter machines, or another part that answers, did not do so in time
    │   └── ReleaseGoneError       they hold another release by now than the one asked for
    └── RequestError           an HTTP request that cannot be answered (carries the 4xx status)

Each carries one sentence that names what is wrong, the value met, where it came from, and what to do. All of them survive
pickling, because Ray carries errors from workers to the driver that way.
"""

from __future__ import annotations


class MimRayError(Exception):
    """Base class: catch this to catch everything that mim_ray raises on purpose."""


class ConfigError(MimRayError, ValueError):
    """One or more settings are wrong; the message lists all of them."""


class DataError(MimRayError, ValueError):
    """A table or a file cannot be used as a whole."""


class ArtifactError(MimRayError, ValueError):
    """What a stage left is missing, damaged, or does not fit."""


class VersionMismatchError(ArtifactError):
    """Two artifacts name different encoder versions."""


class StorageError(MimRayError, OSError):
    """An object store cannot be reached, refuses, or lacks what commits need; nothing is wrong with what is stored."""


class TrainingError(MimRayError, RuntimeError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss is NaN or infinite; raised before the optimizer moves."""


class UnavailableError(MimRayError, TimeoutError):
    """What should answer is away; the same question may be answered a moment later."""


class ReleaseGoneError(UnavailableError):
    """The parameter machines have switched to another release, and no longer hold the one that was asked for."""


class RequestError(MimRayError, ValueError):
    """A request that cannot be answered; `status` is the HTTP status code."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message, status)
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return self.message
