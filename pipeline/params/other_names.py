"""Names of settings in other programs, and what to use here. Imports no torch."""

from __future__ import annotations

import re

from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS

# plain name (see `plain_name`) -> the setting here
_SETTINGS = {
    **dict.fromkeys(
        (
            "maxtokens",
            "maxlength",
            "maxcompletiontokens",
            "maxoutputtokens",
            "numpredict",
            "npredict",
            "maxgentoks",
            "maxtokenstosample",
        ),
        "max_new_tokens",
    ),
    **dict.fromkeys(("mintokens", "minlength"), "min_new_tokens"),
    **dict.fromkeys(("stopsequences", "stopstrings", "until"), "stop"),
    **dict.fromkeys(("numreturnsequences", "bestof"), "n"),
    **dict.fromkeys(("temp", "temperatures"), "temperature"),
    **dict.fromkeys(("seeds", "randomseed", "rngseed"), "seed"),
    "topks": "top_k",
    "repeatpenalty": "repetition_penalty",
    "toplogprobs": "logprobs",
    "badwordsids": "bad_words",
    **{name.replace("_", ""): name for name in SAMPLING_SETTINGS},
}
_BEAMS = "beam search is not available; n with logprobs samples several completions"
_CUTOFFS = "use min_p or top_p"
# plain name -> what to do instead
_ADVICE = {
    "dosample": "temperature: 0 is greedy decoding, any other temperature samples",
    "greedy": "use temperature=0",
    "echo": "the output has a column with the prompt",
    "promptlogprobs": "gptbatch score computes the log probabilities of given texts",
    **dict.fromkeys(
        ("guidedjson", "guidedregex", "guidedchoice", "jsonschema", "responseformat", "grammar"),
        "output of a given form is not available; gptbatch score compares given choices",
    ),
    **dict.fromkeys(("numbeams", "beamsize", "lengthpenalty", "earlystopping"), _BEAMS),
    **dict.fromkeys(("typicalp", "etacutoff", "epsiloncutoff", "toph"), _CUTOFFS),
    "ignoreeos": "it is a setting of the run, ignore_eos",
    "eostokenid": "use stop_token_ids",
    **dict.fromkeys(
        ("samplingparams", "generationconfig", "generationkwargs", "genkwargs"),
        "give each setting by its own name",
    ),
}


def setting_of(name: str) -> str | None:
    """Return the setting that a name of another program means, "" without an equivalent here.

    None for a name that means no setting.
    """
    plain = plain_name(name)
    return _SETTINGS.get(plain, "" if plain in _ADVICE else None)


def advice_for(name: str) -> str:
    """Return what to use instead of a setting of another program; "" for other names."""
    setting = setting_of(name)
    return f"use {setting}" if setting else _ADVICE.get(plain_name(name), "")


def plain_name(name: str) -> str:
    """Return a name in lower case without separators."""
    return re.sub(r"[-_ ]", "", name.lower())
