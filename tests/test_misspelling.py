"""Which known name a misspelt one stands for: keys, variables, commands, and fields of rows."""

from __future__ import annotations

import itertools
import random
import string
import time

import pytest

from gptbatch.jobs.group import COMMANDS
from gptbatch.pipeline.config.problems import nearest_keys
from gptbatch.pipeline.config.settings import config_fields
from gptbatch.pipeline.input.fields import missing_field
from gptbatch.pipeline.params.misspelling import edit_distance, meant_names
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS

# name -> the settings that it may be a misspelling of
SETTINGS = {
    # a vowel, swapped letters, one too many, one missing, a plural
    "sead": ["seed"],
    "sede": ["seed"],
    "seeed": ["seed"],
    "stpo": ["stop"],
    "stp": [],
    "stops": ["stop"],
    "stopp": ["top_p", "stop"],
    "mni_p": ["min_p"],
    "tok_k": ["top_k"],
    "Top-K": ["top_k"],
    "logprob": ["logprobs"],
    "bad_wrods": ["bad_words"],
    "temprature": ["temperature"],
    "tempersture": ["temperature"],
    "max_new_token": ["max_new_tokens"],
    "max_nwe_tokens": ["max_new_tokens"],
    "repetion_penalty": ["repetition_penalty"],
    "freqency_penalty": ["frequency_penalty"],
    # names of their own
    "step": [],
    "speed": [],
    "need": [],
    "seen": [],
    "send": [],
    "shop": [],
    "took": [],
    "stopped": [],
    "min_x": [],
    "top_1": [],
    "top_5": [],
    "mind": [],
    "mini": [],
    "tops": [],
    "topic": [],
    "nn": [],
    "ns": [],
    "text": [],
    "id": [],
    "label": [],
    "penalty": [],
    "tokens": [],
    "logs": [],
    "stop_reason": [],
}
KEYS = {
    "dtyp": ["engine.dtype"],
    "engine.dtyp": ["engine.dtype"],
    "threads": ["engine.threads"],
    "splt": ["split"],
    "ovrewrite": ["overwrite"],
    "outputs": ["output"],
    # words of the name, or words around it
    "output_dir": ["output"],
    "model_name": ["model"],
    "stop_words": ["stop"],
    "num_threads": ["engine.threads"],
    "batch": ["engine.batch_size"],
    "template": ["prompt_template"],
    "memory": ["engine.memory_gib"],
    # nothing like them
    "gpu": [],
    "in": [],
    "host": [],
    "workers": [],
    "verbose": [],
    "timeout": [],
    "retries": [],
    "tokenizer": [],
    "precision": [],
    "quantization": [],
    "text_field": [],
    "service_hosts": [],
}
NAMES_OF_COMMANDS = {
    "generat": ["generate"],
    "bnech": ["bench"],
    "stats": ["status"],
    "train": ["train-demo"],
    "check": ["check-model"],
    "serve": [],
    "compare": [],
    "convert": [],
    "delete": [],
    "clean": [],
    "info": [],
    "run": [],
}


@pytest.mark.parametrize(("name", "meant"), SETTINGS.items())
def test_settings(name: str, meant: list[str]) -> None:
    assert meant_names(name, SAMPLING_SETTINGS) == meant


@pytest.mark.parametrize(("name", "nearest"), KEYS.items())
def test_keys(name: str, nearest: list[str]) -> None:
    assert nearest_keys(name, list(config_fields())) == nearest


@pytest.mark.parametrize(("name", "nearest"), NAMES_OF_COMMANDS.items())
def test_commands(name: str, nearest: list[str]) -> None:
    assert nearest_keys(name, list(COMMANDS)) == nearest


def test_known_names_are_only_themselves() -> None:
    keys = list(config_fields())
    assert all(nearest_keys(key, keys) == [key] for key in keys)
    assert all(meant_names(key, SAMPLING_SETTINGS) == [key] for key in SAMPLING_SETTINGS)


def test_long_names_take_no_time() -> None:
    assert meant_names("temperature" * 1_000_000, SAMPLING_SETTINGS) == []


def test_many_similar_names_take_no_time() -> None:
    letters = zip("temperature" * 2, "TEMPERATURE" * 2, strict=True)
    known = list(map("".join, itertools.islice(itertools.product(*letters), 30_000)))
    began_s = time.process_time()
    assert meant_names("temperature" * 2, known) == known
    assert time.process_time() - began_s < 3


def test_a_misspelt_field_is_looked_for_among_the_first() -> None:
    fields = dict.fromkeys((f"question_{number:04}" for number in range(10_000)), "x")
    for path, hint in {
        "qestion_0000": "takes question_0000)",
        "qestion_9999": "names the one to use",
    }.items():
        assert hint in str(missing_field(fields, path, "prompt_field"))


def test_the_field_of_the_prompt() -> None:
    assert "(--prompt-field question takes question)" in str(
        missing_field({"question": "x", "answer": "y"}, "qestion", "prompt_field")
    )
    assert "names the one to use" in str(
        missing_field({"promotion": "x"}, "prompt", "prompt_field")
    )


def test_the_distance_is_that_of_its_definition() -> None:
    """Against the recursive definition, on short words of few letters."""

    def defined(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        ways = [defined(a[:-1], b) + 1, defined(a, b[:-1]) + 1]
        ways.append(defined(a[:-1], b[:-1]) + (a[-1] != b[-1]))
        if len(a) > 1 and len(b) > 1 and (a[-1], a[-2]) == (b[-2], b[-1]):
            ways.append(defined(a[:-2], b[:-2]) + 1)
        return min(ways)

    source = random.Random(0)
    words = [
        "".join(source.choices(string.ascii_lowercase[:3], k=source.randrange(6)))
        for _ in range(200)
    ]
    for a, b in itertools.pairwise(words):
        assert edit_distance(a, b) == defined(a, b), (a, b)
