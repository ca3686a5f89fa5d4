"""The facts of a run that its manifest and the footer of each part record."""

from __future__ import annotations

import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.model.checkpoint import Checkpoint
from gptbatch.pipeline.model.loading import LoadedModel
from gptbatch.pipeline.output.schema import FORMAT
from gptbatch.pipeline.system.redact import redact

# Facts that name no folder, no input and no machine.
_PUBLIC = (
    "config_hash",
    "model_digest",
    "tokenizer_digest",
    "input_digest",
    "dtype",
    "device",
    "batch_invariance",
    "environment",
    "versions",
)
_PACKAGES = ("gptbatch", "torch", "tokenizers", "datasets", "pyarrow", "numpy")


def collect_run_facts(
    config: JobConfig,
    identity: dict[str, Any],
    checkpoint: Checkpoint,
    loaded: LoadedModel | None,
) -> dict[str, Any]:
    """Return the facts of a run as JSON values.

    Args:
        config: The settings of the job.
        identity: The identity of the job, its input included.
        checkpoint: The checkpoint of the model.
        loaded: The model on this machine; None for an input without rows, which needs none.
    """
    source = f"{config.dataset}[{config.split}]"
    if config.inputs:
        more = f" and {len(config.inputs) - 1} more" if len(config.inputs) > 1 else ""
        source = f"{config.inputs[0]}{more}"
    return {
        "format": FORMAT,
        "identity": identity,
        "config_hash": identity["config_hash"],
        "model": redact(config.model),
        "model_path": str(checkpoint.folder.resolve()),
        "model_digest": identity["model_digest"],
        "tokenizer_digest": identity["tokenizer_digest"],
        "input": redact(source),
        "input_digest": identity["input_digest"],
        "dtype": config.engine.dtype,
        "device": None if loaded is None else loaded.model.device.type,
        "host": socket.gethostname(),
        "batch_invariance": None if loaded is None else loaded.batch_invariance,
        "environment": {} if loaded is None else loaded.environment,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def public_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that may be published: those that name no folder, input and machine."""
    return {name: facts[name] for name in _PUBLIC if name in facts}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
