"""What a user should hear about the rows of an input besides errors: said once per run, with counts."""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from gptbatch.pipeline.input.strict_json import shorten
from gptbatch.pipeline.types import SAMPLING_SETTINGS

logger = logging.getLogger("gptbatch")

_MAX_NAMED = 8
_SIMILARITY = 0.85
_CONTAINERS = (
    "parameters",
    "params",
    "options",
    "config",
    "kwargs",
    "settings",
)  # objects in which requests hold settings
# names that other programs give to settings, without case and separators -> ours, "" where there is none
_FOREIGN = {
    **dict.fromkeys(
        (
            "maxtokens",
            "maxlength",
            "maxcompletiontokens",
            "maxoutputtokens",
            "numpredict",
            "npredict",
        ),
        "max_new_tokens",
    ),
    "topks": "top_k",
    **dict.fromkeys(("temp", "temperatures"), "temperature"),
    **dict.fromkeys(("seeds", "randomseed", "rngseed"), "seed"),
    **dict.fromkeys(
        (
            "stop",
            "stopsequences",
            "stopstrings",
            "stoptokenids",
            "topp",
            "minp",
            "typicalp",
            "n",
            "bestof",
            "numreturnsequences",
            "dosample",
            "numbeams",
            "beamsize",
            "repetitionpenalty",
            "presencepenalty",
            "frequencypenalty",
            "lengthpenalty",
            "norepeatngramsize",
            "logitbias",
            "logprobs",
            "echo",
            "badwords",
            "mintokens",
            "minnewtokens",
            "minlength",
            "ignoreeos",
            "until",
            "maxgentoks",
            "maxtokenstosample",
            "badwordsids",
            "eostokenid",
            "samplingparams",
            "generationconfig",
            "generationkwargs",
            "genkwargs",
        ),
        "",
    ),
    **{name.replace("_", ""): name for name in SAMPLING_SETTINGS},
}


class RowWarnings:
    """Collects over all rows, and tells at the end."""

    def __init__(self) -> None:
        self._settings: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._verdicts: dict[str, str | None] = {}

    def count_settings(self, fields: Mapping[str, Any], prefix: str = "") -> None:
        """Count the fields of one object that look like settings and are none, and those of objects that hold settings elsewhere."""
        for name, value in fields.items():
            if name not in self._verdicts:
                self._verdicts[name] = _meant(name)
            if self._verdicts[name] is not None:
                self._settings[prefix + name] += 1
            elif isinstance(value, dict) and name.lower() in _CONTAINERS:
                self.count_settings(value, f"{prefix}{name}.")

    def count_left_out(self, path: str) -> None:
        """Count a value that JSON has no form for."""
        self._left_out[path] += 1

    def log(self, source: str, rows: int) -> None:
        """Log a warning per kind."""
        if not rows:
            logger.warning("%s: has no rows", source)
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
        meant = self._verdicts[short]
        return f"{shorten(name)} in {count} row{'s' * (count > 1)}" + (
            f" (did you mean {meant}?)" if meant and meant != short else ""
        )


def _meant(name: str) -> str | None:
    """The setting that a field's name resembles; "" for one that there is not; None for an ordinary name."""
    if name in SAMPLING_SETTINGS:
        return name
    plain = re.sub(r"[-_ ]", "", name.lower())
    if plain in _FOREIGN:
        return _FOREIGN[plain]
    close = difflib.get_close_matches(
        name.lower(),
        [setting for setting in SAMPLING_SETTINGS if len(setting) > 8],
        n=1,
        cutoff=_SIMILARITY,
    )
    return close[0] if close else None
