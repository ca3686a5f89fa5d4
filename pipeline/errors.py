"""The errors that gptbatch raises on purpose, each with the exit code of the command that meets it.

    GptbatchError                 70
    +-- ConfigError               78  a setting is wrong, alone or together with others
    |   +-- DeviceError           78  this machine does not have what the config asks for
    |   +-- ModelError            78  the checkpoint cannot be used
    |   +-- OutputConflictError   78  the output folder holds something else
    +-- InputRowsError            65  rows that cannot be read or hold invalid values
    +-- InputNotFoundError        66  no such file, dataset or split
    +-- OutputBusyError           69  another run holds the output
    +-- OutputCreationError       73  the output folder cannot be created
    +-- StorageError              74  reading or writing failed
    +-- StoppedError              75  stopped on the way, run it again to go on
        +-- OutOfMemoryError      75  not even one row fits

A message says what, where, the value seen and what to do. It never holds a prompt or a completion.
"""

from __future__ import annotations

from typing import ClassVar


class GptbatchError(Exception):
    """Base of all errors that are not bugs."""

    exit_code: ClassVar[int] = 70


class ConfigError(GptbatchError):
    """A setting is wrong.

    `keys` are the config keys at fault ("engine.dtype"), so that a caller who set them can name its own words for them.
    """

    exit_code = 78

    def __init__(self, message: str, *, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


class DeviceError(ConfigError):
    """This machine does not have what the config asks for."""


class ModelError(ConfigError):
    """The checkpoint is missing, damaged, or of an architecture that is not GPT-2."""


class OutputConflictError(ConfigError):
    """The output folder holds something that this run must not touch."""


class InputRowsError(GptbatchError):
    """Rows that cannot be read or hold invalid values; the message names the first 20."""

    exit_code = 65


class InputNotFoundError(GptbatchError):
    """No such file, dataset or split."""

    exit_code = 66


class OutputBusyError(GptbatchError):
    """Another run holds the output folder."""

    exit_code = 69


class OutputCreationError(GptbatchError):
    """The output folder cannot be created."""

    exit_code = 73


class StorageError(GptbatchError):
    """Reading or writing failed: a full disk, a damaged file, a device that went away."""

    exit_code = 74


class StoppedError(GptbatchError):
    """Stopped on the way, by a signal say. What is committed stays; the same run again goes on from there."""

    exit_code = 75


class OutOfMemoryError(StoppedError):
    """Not even one row at a time fits into memory; the message names it."""
