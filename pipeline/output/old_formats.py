"""Names in outputs of earlier versions, translated to the current ones on reading.

Formats gptbatch-1 and gptbatch-2 use other names for keys and values of manifests, part footers,
configs and columns. The reading code translates each of these once, before validation, and then
sees only current names. Decision margins of formats 1 to 4 overlook tokens outside the kept set and
ties; they are read as null.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_OLD_FORMAT = re.compile(r"gptbatch-[12](-[0-9a-f]{8})?")
_OLD_MARGINS = re.compile(r"gptbatch-[1-4](-[0-9a-f]{8})?")

_FACT_NAMES = {
    "fingerprint": "config_hash",
    "numerics": "batch_invariance",
    "profile": "environment",
    "memory_halvings": "batch_size_halvings",
}
_ENVIRONMENT_NAMES = {
    "products": "reduction_order",
    "row_plan": "padding_plan",
    "probe_digest": "self_test_digest",
}
_PADDING_PLANS = {
    "as they come": "as_is",
    "rounded": "pad_8",
    "more": "pad_32",
    "constant": "fixed_64",
}
_CONFIG_NAMES = {
    "numerics": "batch_invariance",
    "allow_other_profile": "allow_other_environment",
}


def is_old_format(name: Any) -> bool:
    """Return whether `name` is a format whose names need translation."""
    return isinstance(name, str) and _OLD_FORMAT.fullmatch(name) is not None


def has_column(format_name: Any, column: str) -> bool:
    """Return whether a column has its present meaning in outputs of a format."""
    is_old_margin = column == "min_decision_margin" and _OLD_MARGINS.fullmatch(str(format_name))
    return not is_old_margin


def translate_facts(content: Any) -> Any:
    """Return a manifest or footer with current names; one of the current format is unchanged.

    Args:
        content: The parsed JSON, not validated yet.
    """
    if not isinstance(content, dict) or not is_old_format(content.get("format")):
        return content
    facts = _renamed(content, _FACT_NAMES)
    if facts.get("batch_invariance") == "exact":
        facts["batch_invariance"] = "verified"
    if isinstance(facts.get("identity"), dict):
        facts["identity"] = _renamed(facts["identity"], _FACT_NAMES)
    if isinstance(facts.get("environment"), dict):
        environment = facts["environment"] = _renamed(facts["environment"], _ENVIRONMENT_NAMES)
        if isinstance(environment.get("padding_plan"), str):
            first, comma, others = environment["padding_plan"].partition(",")
            environment["padding_plan"] = _PADDING_PLANS.get(first, first) + comma + others
    return facts


def translate_config(content: dict[str, Any], format_name: Any) -> dict[str, Any]:
    """Return the config of a run with current keys and values.

    `metadata_field` of earlier versions is left out: it says how rows are read, not what they hold.
    """
    config = {key: value for key, value in content.items() if key != "metadata_field"}
    if not is_old_format(format_name):
        return config
    config = _renamed(config, _CONFIG_NAMES)
    if config.get("batch_invariance") == "exact":
        config["batch_invariance"] = "require"
    return config


def _renamed(content: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in content.items()}
