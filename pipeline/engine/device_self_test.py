"""The self-test of the device's engine: its completions against those of the host's engine.

Both use the same kernels. The engine of the host runs each step on its own and samples by
engine/sampling.py. That of the device keeps its state there, samples there, launches steps ahead,
and replays CUDA graphs. Its cache begins with garbage. Prompts are ragged, and some begin alike;
the batch has two sizes, so that rows meet other sizes of a step, other indices and other blocks.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import torch

from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Completion, Prompt, TokenizedPrompt

if TYPE_CHECKING:
    from gptbatch.pipeline.model.gpt import GPT

logger = logging.getLogger("gptbatch")

LENGTHS = (1, 40, 5, 66, 16, 2, 70, 31, 9, 65, 12, 3, 24, 7, 33, 18, 11, 48)
NEW_TOKENS = 12
BATCH_SIZES = (3, 17)
HOST_BATCH_SIZE = 8
# Margins by the logarithm of another library may differ in the last bit.
MARGIN_TOLERANCE = 1e-9
LOGPROB_TOLERANCE = 1e-5
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 0.0, "top_k": 0},
    {"temperature": 0.9, "top_k": 20, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 0, "top_p": 0.9},
    {"temperature": 0.9, "top_k": 90, "top_p": 0.5},
    {"temperature": 0.9, "top_k": 0, "min_p": 0.1},
    {
        "temperature": 0.8,
        "top_k": 40,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
        "no_repeat_ngram_size": 2,
        "logprobs": 2,
    },
    {
        "temperature": 1.0,
        "top_k": 0,
        "presence_penalty": 0.5,
        "logit_bias": ((0, 2.5),),
        "stop_token_ids": (0,),
        "min_new_tokens": 4,
        "bad_words": ("ba", "e"),
    },
)


def device_engine_problem(model: GPT, *, compares: bool = True, **options: Any) -> str:
    """Return what differs between the engines of device and host; "" where they are equal.

    Args:
        model: A model with Triton kernels.
        compares: Compare them. If not, the device's only runs, and may raise.
        **options: Attributes of `DeviceEngine`.
    """
    began = time.monotonic()
    prompts = _prompts(model)
    lengths = [len(prompt.token_ids) + NEW_TOKENS for prompt in prompts]
    spec = model.cache_spec
    own: dict[str, Any] = {
        "model": model,
        "eos_token_ids": (),
        "memory_bytes": spec.capacity_for(lengths) * spec.bytes_per_token,
        "token_bytes": [bytes([97 + token % 26]) for token in range(model.config.vocab_size)],
    }
    if not compares:
        _run(DeviceEngine(batch_size=BATCH_SIZES[-1], **own, **options), prompts)
        return ""
    host = Engine(batch_size=HOST_BATCH_SIZE, **own)
    expected = _run(host, prompts)
    del host
    for batch_size in BATCH_SIZES:
        engine = DeviceEngine(batch_size=batch_size, **own, **options)
        _fill_with_garbage(engine)
        # The second time all steps are replayed.
        for what in ("the first time", "replayed"):
            problem = _difference(_run(engine, prompts), expected)
            if problem:
                return f"{problem} differ in batches of {batch_size}, {what}"
    logger.info("the engine of the device passed its self-test in %.1f s", time.monotonic() - began)
    return ""


def _prompts(model: GPT) -> list[TokenizedPrompt]:
    vocab_size, n_positions = model.config.vocab_size, model.config.n_positions
    prompts = []
    for index, length in enumerate(LENGTHS):
        # Prompts of 65 tokens and more begin alike.
        first = 0 if length > 64 else index
        tokens = [(7919 * (first + i) + 104729 * i * i) % vocab_size for i in range(length)]
        params = SamplingParams(
            seed=2**40 + index,
            max_new_tokens=NEW_TOKENS,
            **SETTINGS[index % len(SETTINGS)],
        )
        prompt = Prompt(index=index, prompt_id=str(index), text="", params=params, metadata=None)
        tokens = tokens[: max(1, n_positions - NEW_TOKENS)]
        prompts.append(
            TokenizedPrompt(prompt=prompt, token_ids=tokens, tokens_dropped=0, read_s=0.0)
        )
    return prompts


def _run(engine: Engine, prompts: list[TokenizedPrompt]) -> list[Completion]:
    ended = [done for completions in engine.generate(iter(prompts)) for done in completions]
    return sorted(ended, key=lambda completion: completion.prompt.index)


def _fill_with_garbage(engine: DeviceEngine) -> None:
    for layer in engine.cache_layers:
        for tensor in (layer.data, layer.scales):
            if tensor is not None:
                with torch.inference_mode():
                    tensor.fill_(math.nan if tensor.is_floating_point() else 77)
    assert engine.stream is not None
    engine.stream.catch_up()


def _difference(found: list[Completion], expected: list[Completion]) -> str:
    for device, host in zip(found, expected, strict=True):
        if (device.token_ids, device.error) != (host.token_ids, host.error):
            return "tokens"
        margins = (device.min_decision_margin or 0.0, host.min_decision_margin or 0.0)
        if not math.isclose(*margins, rel_tol=0, abs_tol=MARGIN_TOLERANCE):
            return "decision margins"
        pairs = zip(_numbers(device), _numbers(host), strict=True)
        if not all(math.isclose(a, b, rel_tol=0, abs_tol=LOGPROB_TOLERANCE) for a, b in pairs):
            return "log probabilities"
    return ""


def _numbers(completion: Completion) -> list[float]:
    """Return all log probabilities of a completion."""
    return [
        number
        for found in completion.logprobs or ()
        for number in (found.logprob, *found.top_logprobs)
    ]
