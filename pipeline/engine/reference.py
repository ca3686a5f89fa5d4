"""The oracle: one prompt at a time, the whole context computed again for each token.

The engine is tested against it. It has its own loop, sampling and noise, in plain Python, and no KV
cache across steps. It calls the same model; `tests/test_model.py` compares that with transformers.
It is never made fast.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import StopReason

# ln 2 in two parts, the first of which has 21 zero bits at its end.
LN2_HIGH, LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10


class Network(Protocol):
    """A model: idx (B, T) -> logits (B, T, V)."""

    config: GPTConfig

    @property
    def device(self) -> torch.device:
        """Where idx must be."""

    def __call__(self, idx: Tensor) -> Tensor:
        """Compute the logits."""


def generate(
    network: Network,
    prompt_token_ids: list[int],
    params: SamplingParams,
    *,
    eos_token_ids: tuple[int, ...],
    window_full: Literal["stop", "slide"] = "stop",
    token_bytes: Sequence[bytes] = (),
) -> tuple[list[int], StopReason]:
    """Return the new tokens of one prompt of 1 to n_positions tokens, and why they stop."""
    n_positions = network.config.n_positions
    new_tokens: list[int] = []
    for step in range(params.max_new_tokens):
        tokens = prompt_token_ids + new_tokens
        if step > 0 and window_full == "stop" and len(tokens) > n_positions:
            return new_tokens, "window"
        idx = torch.tensor([tokens[-n_positions:]], device=network.device)
        with torch.inference_mode():
            logits = network(idx)[0, -1]
        values = adjusted(
            logits.double().tolist(),
            params,
            prompt_token_ids,
            new_tokens,
            end_token_ids=(*eos_token_ids, *params.stop_token_ids),
            token_bytes=token_bytes,
        )
        new_tokens.append(sample_token(values, params, step))
        if new_tokens[-1] in eos_token_ids:
            return new_tokens, "end_of_text"
        if new_tokens[-1] in params.stop_token_ids:
            return new_tokens, "stop_token"
        if len(new_tokens) >= params.min_new_tokens and ends_in_stop(
            new_tokens, params, token_bytes
        ):
            return new_tokens, "stop_string"
    return new_tokens, "max_new_tokens"


def ends_in_stop(
    new_tokens: list[int], params: SamplingParams, token_bytes: Sequence[bytes]
) -> bool:
    """Return whether a stop string ends inside of the bytes of the last token."""
    data = b"".join(token_bytes[token] for token in new_tokens) if params.stop else b""
    before = len(data) - len(token_bytes[new_tokens[-1]]) if params.stop else 0
    return any(
        data[:end].endswith(stop.encode())
        for end in range(before + 1, len(data) + 1)
        for stop in params.stop
    )


def adjusted(
    values: list[float],
    params: SamplingParams,
    prompt: list[int],
    new: list[int],
    *,
    end_token_ids: Sequence[int],
    token_bytes: Sequence[bytes],
) -> list[float]:
    """Return the logits after bias, penalties and masks; every operation rounds to float32."""
    biases = dict(params.logit_bias)
    size = params.no_repeat_ngram_size
    tokens = prompt + new
    ngrams = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    text = b"".join(token_bytes[token] for token in new) if params.bad_words else b""
    result = []
    for token, x in enumerate(values):
        z = to_float32(x + to_float32(biases[token])) if token in biases else x
        if params.repetition_penalty != 1 and token in tokens:
            r = to_float32(params.repetition_penalty)
            z = to_float32(z * r if z < 0 else z / r)
        if token in new:
            frequency = to_float32(to_float32(params.frequency_penalty) * new.count(token))
            z = to_float32(z - frequency)
            z = to_float32(z - to_float32(params.presence_penalty))
        is_masked = (
            (params.allowed_token_ids is not None and token not in params.allowed_token_ids)
            or (len(new) < params.min_new_tokens and token in end_token_ids)
            or (size > 0 and (*tokens[len(tokens) - size + 1 :], token) in ngrams)
            or any(word.encode() in text + token_bytes[token] for word in params.bad_words)
        )
        result.append(-math.inf if is_masked else z)
    return result


def to_float32(x: float) -> float:
    """Round to float32."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def sample_token(values: list[float], params: SamplingParams, step: int) -> int:
    """Sample from logits (V,): the kept token of the largest logit + temperature * noise."""
    lowest = cutoff(values, params)
    best_token, best_score = -1, -math.inf
    for token, logit in enumerate(values):
        if logit < lowest or logit == -math.inf:
            continue
        score = logit
        if params.temperature > 0:
            score += params.temperature * gumbel(params.seed, step, token)
        if score > best_score:
            best_token, best_score = token, score
    return best_token


def cutoff(values: list[float], params: SamplingParams) -> float:
    """Return the smallest logit that is kept."""
    k = min(params.top_k, len(values)) or len(values)
    lowest = sorted(values, reverse=True)[k - 1]
    if params.temperature == 0:
        return lowest
    if params.top_p < 1:
        bits = 46 if len(values) <= 65_536 else 40
        lowest = top_p_cutoff([value for value in values if value >= lowest], params, bits)
    if params.min_p > 0:
        lowest = max(lowest, max(values) - min_p_range(params))
    return lowest


def top_p_cutoff(values: list[float], params: SamplingParams, bits: int) -> float:
    """Return the smallest logit that top_p keeps, of those that top_k keeps."""
    largest = max(values)
    masses = {value: mass((value - largest) / params.temperature, bits) for value in values}
    limit = params.top_p * float(sum(masses[value] for value in values))
    lowest, above = largest, 0
    for value in sorted(masses, reverse=True):
        if not float(above) < limit:
            break
        lowest = value
        above += masses[value] * values.count(value)
    return lowest


def mass(x: float, bits: int) -> int:
    """Return exp(x) * 2^bits as a whole number, x <= 0; formula and constants as in nucleus.py."""
    if x < -33:
        return 0
    n = round(x * (1 / math.log(2)))
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    total = 1 / math.factorial(13)
    for k in range(12, -1, -1):
        total = total * r + 1 / math.factorial(k)
    return round(total * 2.0 ** (n + bits))


def token_logprob(logits: Tensor, token: int) -> float:
    """Return the log probability of a token at temperature 1, from logits (V,), in float64."""
    values: list[float] = logits.double().tolist()
    largest, bits = max(values), 46 if len(values) <= 65_536 else 40
    total = sum(mass(value - largest, bits) for value in values)
    return (values[token] - largest) - math.log(float(total) * 2.0**-bits)


def min_p_range(params: SamplingParams) -> float:
    """Return how far below the largest logit a token is min_p times as likely."""
    return -params.temperature * math.log(params.min_p)


def gumbel(seed: int, step: int, token: int) -> float:
    """Return the noise g of noise.py; the last bit of the logarithms may differ from torch's."""
    u = (random_bits(seed, step, token) + 0.5) * 2.0**-52
    return -math.log(-math.log(u))


def random_bits(seed: int, step: int, token: int) -> int:
    """Return the 52 bits n of noise.py, equal bit for bit."""
    words = philox4x32((token // 2, step, 0, 0), (seed % 2**32, seed // 2**32))
    high, low = words[2:] if token % 2 else words[:2]
    return high * 2**20 + low // 2**12


# Two tokens share a result.
@functools.lru_cache(maxsize=2**17)
def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Compute Philox4x32-10 (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high2, low2 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3
