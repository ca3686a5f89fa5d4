"""Claiming an output folder for a job, before its first part is written."""

from __future__ import annotations

from typing import Any

from gptbatch.pipeline.errors import OutputConflictError, StorageError
from gptbatch.pipeline.output.folder import CONFIG, SUCCESS, FolderState, OutputFolder
from gptbatch.pipeline.output.manifest import (
    MANIFEST,
    DamagedManifestError,
    manifest_text,
    read_manifest,
)
from gptbatch.pipeline.output.part_file import inspect_part
from gptbatch.pipeline.output.part_plan import describe_differences, differing_keys
from gptbatch.pipeline.storage.atomic_write import Writer

# Tries to write the manifest while another program creates and deletes it.
MAX_CLAIM_TRIES = 3


def claim(
    folder: OutputFolder,
    writer: Writer,
    config_yaml: str,
    facts: dict[str, Any],
    *,
    joins: bool = False,
    replaces: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Claim the folder for a job.

    Args:
        folder: The output folder.
        writer: Writes files atomically.
        config_yaml: The resolved config.
        facts: Facts of the run, its identity among them.
        joins: Accept the claim of another run of the same job and input.
        replaces: The identity of the run that this one replaces; None when it replaces none.

    Returns:
        The facts of the run that claims the folder: this run, or the one that it joins.

    Raises:
        OutputConflictError: Another job has claimed the folder since it was inspected.
    """
    claimed = write_manifest(
        folder, writer, facts, manifest_text(facts), joins=joins, replaces=replaces
    )
    if claimed is facts:
        writer.remove(folder.path / SUCCESS)
    if claimed is facts or not (folder.work / CONFIG).exists():
        writer.write_text(folder.work / CONFIG, config_yaml)
    return claimed


def write_manifest(
    folder: OutputFolder,
    writer: Writer,
    facts: dict[str, Any],
    text: str,
    *,
    joins: bool = False,
    replaces: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the manifest, unless that of another job is in place.

    Args:
        folder: The output folder.
        writer: Writes files atomically.
        facts: Facts of the run, its identity among them.
        text: The content.
        joins: Keep a manifest of the same job and input, unless it is complete and parts are
            missing.
        replaces: The identity of another job that is replaced.

    Returns:
        The facts in the manifest: those given, or the kept ones.

    Raises:
        OutputConflictError: Another job has claimed the folder.
    """
    target, identity = folder.path / MANIFEST, facts["identity"]
    for _ in range(MAX_CLAIM_TRIES):
        current = read_claim(folder, identity, replaces)
        if (
            joins
            and current is not None
            and current["identity"].get("rows") == identity["rows"]
            and not differing_keys(identity, current["identity"])
            and not (
                current.get("complete") and folder.missing_parts(len(current.get("parts", [])))
            )
        ):
            return current
        if writer.write_text(target, text, only_if_absent=current is None):
            return facts
    raise StorageError(
        f"{target}: appears and disappears; is another program working in this folder?"
    )


def read_claim(
    folder: OutputFolder, identity: dict[str, Any], replaces: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the manifest; None where there is none.

    Raises:
        OutputConflictError: It is of another job than `identity`, and not the one to replace.
    """
    try:
        current = read_manifest(folder.path / MANIFEST)
    except DamagedManifestError:
        # It was damaged when the folder was inspected, and is replaced now.
        return {"identity": identity, "complete": True}
    if current is not None:
        keys = differing_keys(identity, current["identity"])
        if keys and current["identity"] != replaces:
            raise OutputConflictError(
                f"{folder.path}: another job has begun there since "
                f"({describe_differences(keys, current['identity'], identity)}); its files stay as "
                "they are; name another output"
            )
    return current


def delete_run(folder: OutputFolder, writer: Writer, state: FolderState) -> None:
    """Delete the run in a folder: its `_SUCCESS` and its parts.

    Other files stay. The manifest stays until the next run replaces it, so that the folder is never
    unclaimed.

    Args:
        folder: The output folder.
        writer: Deletes files durably.
        state: The run.
    """
    writer.remove(folder.path / SUCCESS)
    for path in state.parts.values():
        if inspect_part(path, content=False).footer is not None:
            writer.remove(path)
