"""The errors of gptbatch, and the exit code of the command for each of them.

    GptbatchError                 70
    +-- ConfigError               78  a setting is wrong
    |   +-- DeviceError           78  the machine lacks a device or feature of the config
    |   +-- ModelError            78  the checkpoint cannot be used
    |   +-- OutputConflictError   78  the output folder holds something else
    +-- InputRowsError            65  rows that cannot be read or hold invalid values
    +-- InputNotFoundError        66  no such file, dataset, split, run or row
    +-- OutputBusyError           69  another run holds the output
    +-- OutputCreationError       73  the output folder cannot be created
    +-- StorageError              74  reading or writing failed
    +-- IncompleteError           75  parts are missing
    +-- StoppedError              75  stopped by a signal; the same command continues the run
        +-- OutOfMemoryError      75  not even one row fits

A message says what is wrong, where, the value, and what to do. It never quotes a prompt or a
completion.
"""

from __future__ import annotations

from typing import ClassVar


class GptbatchError(Exception):
    """Base class of all errors that are not bugs."""

    exit_code: ClassVar[int] = 70


class ConfigError(GptbatchError):
    """A setting of the config file or the environment is wrong, or one does not fit the job.

    Attributes:
        keys: The wrong config keys, such as "engine.dtype". The command line names their options.
    """

    exit_code = 78

    def __init__(self, message: str, *, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


class DeviceError(ConfigError):
    """The machine lacks the device or a feature that the config requires."""


class ModelError(ConfigError):
    """The checkpoint is missing, damaged, or of an architecture that is not GPT-2."""


class OutputConflictError(ConfigError):
    """The output folder holds another job, or files that this run must not change."""


class InputRowsError(GptbatchError):
    """Rows that cannot be read or hold invalid values; the message names the first 20 reasons."""

    exit_code = 65


class InputNotFoundError(GptbatchError):
    """No such file, dataset, split, recorded run or row."""

    exit_code = 66


class OutputBusyError(GptbatchError):
    """Another run holds the output folder."""

    exit_code = 69


class OutputCreationError(GptbatchError):
    """The output folder cannot be created."""

    exit_code = 73


class StorageError(GptbatchError):
    """Reading or writing failed: a full disk, a damaged file, a lost device."""

    exit_code = 74


class IncompleteError(GptbatchError):
    """Parts of the output are missing. The command that generates them continues the run."""

    exit_code = 75


class StoppedError(GptbatchError):
    """The run was stopped, for example by a signal. The same command continues it."""

    exit_code = 75


class OutOfMemoryError(StoppedError):
    """One row alone does not fit into memory; the message names the row."""
