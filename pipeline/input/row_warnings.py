"""Counts the fields of an input, and logs each kind of warning about its rows once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from gptbatch.pipeline.input.strict_json import shorten
from gptbatch.pipeline.params.misspelling import meant_names
from gptbatch.pipeline.params.other_names import advice_for, setting_of
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS

logger = logging.getLogger("gptbatch")

_MAX_NAMED = 8
# names of fields that are counted; rows may have keys of their own
_MAX_COUNTED = 1000
# objects in which requests of other programs hold settings
_CONTAINERS = ("parameters", "params", "options", "config", "kwargs", "settings")


class FieldCounts:
    """Counts the rows that have each field, for settings and metadata.

    Attributes:
        settings: Name of a setting -> rows with a field of this name.
        metadata: Key -> rows that have it as metadata, for the first 1,000 keys.
    """

    def __init__(self) -> None:
        self.settings: Counter[str] = Counter()
        self.metadata: Counter[str] = Counter()

    def add_settings(self, fields: Mapping[str, Any]) -> None:
        """Count the settings among the fields of a row."""
        self.settings.update(name for name in SAMPLING_SETTINGS if name in fields)

    def add_metadata(self, fields: Mapping[str, Any]) -> None:
        """Count the fields of a row that are metadata."""
        counts = self.metadata
        counts.update([name for name in fields if name in counts or len(counts) < _MAX_COUNTED])


class RowWarnings:
    """Counts fields that look like settings, and values without a JSON form."""

    def __init__(self) -> None:
        self._settings: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._own: Counter[str] = Counter()
        self._differing: Counter[str] = Counter()
        self._resembled: dict[str, list[str] | None] = {}

    def count_settings(self, fields: Mapping[str, Any], prefix: str = "") -> None:
        """Count the fields of an object that look like settings.

        Objects that hold settings in requests of other programs are searched too.

        Args:
            fields: The fields of a row that are neither prompt, id nor settings, or a nested
                object.
            prefix: The path of a nested object with a final dot.
        """
        for name, value in fields.items():
            if name not in self._resembled:
                self._resembled[name] = _resembled_settings(name)
            if self._resembled[name] is not None:
                self._settings[prefix + name] += 1
            elif isinstance(value, dict) and name.lower() in _CONTAINERS:
                self.count_settings(value, f"{prefix}{name}.")

    def count_own(self, own: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Count the settings that a row has, and those that differ from the settings of the run."""
        self._own.update(own.keys())
        self._differing.update(name for name, value in own.items() if value != run[name])

    def count_left_out(self, path: str) -> None:
        """Count a value without a JSON form by its path."""
        self._left_out[path] += 1

    def log(
        self, source: str, rows: int, *, limit: int | None = None, given: Collection[str] = ()
    ) -> None:
        """Log a warning per kind.

        Args:
            source: The input in messages.
            rows: Number of rows.
            limit: The setting of this name.
            given: Sampling settings of the run that are not left at their defaults.
        """
        if limit == 0:
            logger.warning("%s: no row is read, since limit is 0", source)
        elif not rows:
            logger.warning("%s: has no rows", source)
        if self._own:
            counts = (f"{name} ({count} of {rows} rows)" for name, count in self._own.most_common())
            logger.info("rows have settings of their own: %s", ", ".join(counts))
        without_effect = [
            name for name in given if self._differing[name] and self._own[name] == rows
        ]
        if without_effect:
            logger.warning(
                "%s: these settings of the run have no effect, since every row has its own: %s; "
                "--row-settings names the fields that are settings (none: no field)",
                source,
                ", ".join(without_effect),
            )
        if self._settings:
            named = [
                self._described(name, count)
                for name, count in self._settings.most_common(_MAX_NAMED)
            ]
            if len(self._settings) > _MAX_NAMED:
                named.append(f"and {len(self._settings) - _MAX_NAMED} more")
            logger.warning(
                "%s: fields that look like settings change nothing and are kept as metadata: %s",
                source,
                "; ".join(named),
            )
        if self._left_out:
            named = [
                f"{shorten(path)} ({count} times in {rows} rows)"
                for path, count in self._left_out.most_common(_MAX_NAMED)
            ]
            logger.warning(
                "%s: values without a JSON form are left out of metadata: %s",
                source,
                "; ".join(named),
            )

    def _described(self, name: str, count: int) -> str:
        short = name.rpartition(".")[2]
        settings = self._resembled[short]
        hint = f"did you mean {' or '.join(settings)}?" if settings else advice_for(short)
        return f"{shorten(name)} in {count} row{'s' * (count > 1)}" + (
            f" ({hint})" if hint and settings != [short] else ""
        )


def _resembled_settings(name: str) -> list[str] | None:
    """Return the settings that a field name resembles, usually one.

    Returns:
        None for other names; empty for a setting without an equivalent here.
    """
    if name in SAMPLING_SETTINGS:
        return [name]
    if (setting := setting_of(name)) is not None:
        return [setting] if setting else []
    return meant_names(name, SAMPLING_SETTINGS) or None
