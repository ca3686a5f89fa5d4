"""Print digests of what the C++ kernels compute, as one JSON object: case to SHA-256.

    python -m tests.arithmetic_digests [--models] [--threads N] [--sources FOLDER] [--flag=-FLAG]
        [--without-vnni] [--flush-denormals]
    python -m tests.arithmetic_digests --golden

--golden prints only the digests that stand in pipeline/model/golden.py. They may change together
with the version of the arithmetic only.

tests/test_arithmetic.py runs it in child processes, with other instruction sets, compilers and
sources, and compares the objects. Inputs are made by numpy: the random numbers of torch depend on
the CPU capability.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptbatch.pipeline.doctor.self_tests import demo_digest
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.kernels import build
from gptbatch.pipeline.kernels.constants import HEAD_SIZE_MULTIPLE
from gptbatch.pipeline.kv_cache.quantization import BLOCK_SIZES, CacheDtype
from gptbatch.pipeline.kv_cache.spec import BACKENDS
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import GPTConfig, parse_config
from gptbatch.pipeline.model.golden import golden_digest
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.linear import ACTIVATIONS
from gptbatch.pipeline.model.packing import pack
from gptbatch.pipeline.model.weights import load_gpt
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Prompt, TokenizedPrompt

CACHE_DTYPES: tuple[CacheDtype, ...] = ("auto", "int8")
ODD_SHAPE = {"n_layer": 2, "n_head": 3, "n_embd": 39, "vocab_size": 301, "n_positions": 300}
# Two layers have every product of the twelve of gpt2.
GPT2_SHAPE = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}
# Names in config.json of all activations of the MLP.
ACTIVATION_FUNCTIONS = ("gelu_new", "gelu", "relu", "silu", "tanh")


class Ops:
    """The ops of the kernels. With `flushes`, this thread is set to flush subnormals to 0."""

    flushes = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return the op of this name."""

        def call(*args: object) -> Any:
            torch.set_flush_denormal(self.flushes)
            try:
                return getattr(torch.ops.gptbatch, name)(*args)
            finally:
                torch.set_flush_denormal(False)

        return call


OPS = Ops()


def normal(seed: int, *shape: int) -> Tensor:
    """Return float32 normal numbers that do not depend on the CPU capability."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def digest(*tensors: Tensor) -> str:
    """Return the SHA-256 of the bits."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def linear_digests() -> dict[str, str]:
    """Run linears of odd and large shapes, and every activation over a grid of numbers."""
    found = {}
    for k, n in ((1, 1), (5, 47), (33, 48), (301, 500), (768, 100), (3072, 50)):
        weight, bias, x, residual = (
            normal(i, *shape) for i, shape in enumerate(((n, k), (n,), (20, k), (20, n)))
        )
        packed = torch.ops.gptbatch.pack_weight(weight)
        y = OPS.linear(x, packed, n, bias, residual, "none")
        found[f"linear {k} {n}"] = digest(y)
        tiny = OPS.linear(x * 1e-25, packed * 1e-15, n, None, None, "none")
        found[f"linear of subnormals {k} {n}"] = digest(tiny)
    grid = torch.from_numpy(
        np.concatenate(
            [
                # Every 50,021st number of float32 but NaN, whose sign and payload may differ.
                (bits := np.arange(0, 2**32, 50_021, dtype=np.int64).astype(np.uint32))
                .view(np.float32)[(bits & 0x7FFFFFFF) <= 0x7F800000]
                .copy(),
                np.linspace(-12, 12, 20_011, dtype=np.float32),
            ]
        )
    )[:, None]
    one = torch.ops.gptbatch.pack_weight(torch.eye(1))
    for activation in ACTIVATIONS:
        y = OPS.linear(grid, one, 1, None, None, activation)
        # NaN has many encodings: all become one.
        y[y.isnan()] = 0.125
        found[f"activation {activation}"] = digest(y)
    return found


def norm_digests() -> dict[str, str]:
    """Run layer norms of several widths."""
    found = {}
    for width in (1, 5, 16, 31, 33, 63, 65, 100, 768):
        rows = torch.from_numpy(np.float32(10) ** np.linspace(-3, 3, 70, dtype=np.float32))
        x = normal(width, 70, width) * rows[:, None] + 5
        y = OPS.layer_norm(x, normal(1, width), normal(2, width), 1e-5)
        found[f"layer_norm {width}"] = digest(y)
        y = OPS.layer_norm(x * 1e-41, normal(1, width), torch.zeros(width), 1e-30)
        found[f"layer_norm of subnormals {width}"] = digest(y)
    return found


def attention_digests() -> dict[str, str]:
    """Run attention over both caches, for several head sizes and up to 300 keys."""
    found = {}
    heads, count = 3, 300
    for cache_dtype in CACHE_DTYPES:
        for head_size in (1, 13, 64, 80):
            qkv = normal(head_size, count, 3, heads, head_size)
            size = BLOCK_SIZES[cache_dtype]
            padded = -(-head_size // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE
            n_blocks = -(-count // size)
            stored, numbers = (
                (torch.uint8, padded + 4) if cache_dtype == "int8" else (torch.float32, padded)
            )
            cache = torch.zeros(heads, n_blocks, 2 * size * numbers, dtype=stored)
            table = torch.arange(n_blocks, dtype=torch.int32)[None]
            for scale in (head_size**-0.5, 8.0):
                y = OPS.paged_attention(
                    qkv,
                    cache,
                    table,
                    torch.zeros(count, dtype=torch.long),
                    torch.arange(count),
                    scale,
                )
                found[f"attention {cache_dtype} {head_size} {scale:.3f}"] = digest(y)
    return found


def sampler_digests() -> dict[str, str]:
    """Sample rows with all sampling settings, and compute masses."""
    found = {}
    for vocab_size in (5, 301, 5003, 50257):
        rng = random.Random(vocab_size)
        logits = normal(vocab_size, 60, vocab_size) * 3 - 35
        rows = [
            SamplingParams(
                seed=rng.getrandbits(63),
                temperature=rng.choice([0, 0.3, 1, 2.5]),
                top_k=rng.choice([0, 1, 2, 40, 1000]),
                max_new_tokens=1,
                min_p=rng.choice([0, 0, 1e-9, 0.05]),
                top_p=rng.choice([1, 1, 0.1, 0.5, 0.9, 0.999]),
            )
            for _ in range(60)
        ]
        steps = [rng.randrange(1000) for _ in range(60)]
        sampled = sample_tokens(logits, rows, steps, [1e9] * 60, native=True)
        found[f"sample {vocab_size}"] = digest(
            torch.tensor([row.token for row in sampled]),
            torch.tensor([row.decision_margin for row in sampled], dtype=torch.float64),
        )
        found[f"masses {vocab_size}"] = digest(*OPS.total_masses(logits))
    return found


def random_gpt(config: GPTConfig, cache_dtype: CacheDtype, *, packed: bool = True) -> GPT:
    """Return a GPT with weights by numpy."""
    model = GPT(config, backend=BACKENDS["ragged"], cache_dtype=cache_dtype)
    model.eval().requires_grad_(False)
    for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
        spread = 0.85 * config.n_embd**-0.5 if parameter.dim() > 1 else 0.3
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(centre + spread * normal(seed, *parameter.shape))
    if packed:
        pack(model)
    return model


def config_of(shape: dict[str, int], activation: str) -> GPTConfig:
    """Return the config of a GPT-2 of this shape."""
    return parse_config(
        {"model_type": "gpt2", "activation_function": activation, **shape}, "config"
    )


def prompts(vocab_size: int, lengths: tuple[int, ...], new_tokens: int) -> list[TokenizedPrompt]:
    """Return prompts of random tokens with all kinds of sampling settings."""
    rng = random.Random(1)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 40},
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 50, "min_p": 0.02},
    ]
    made = []
    for i, length in enumerate(lengths):
        chosen = {"top_k": 0, **settings[i % len(settings)]}
        params = SamplingParams(seed=i, max_new_tokens=new_tokens, **chosen)
        prompt = Prompt(index=i, prompt_id=str(i), text="", params=params, metadata=None)
        token_ids = [rng.randrange(1, vocab_size) for _ in range(length)]
        made.append(
            TokenizedPrompt(prompt=prompt, token_ids=token_ids, tokens_dropped=0, read_s=0.0)
        )
    return made


@torch.inference_mode()
def engine_digest(model: GPT, rows: list[TokenizedPrompt]) -> str:
    """Return the hash of tokens, margins and logits digests of all rows."""
    engine = Engine(model=model, batch_size=4, eos_token_ids=(), record_logits=True)
    ended = [done for completions in engine.generate(iter(rows)) for done in completions]
    outcomes = sorted(
        (done.prompt.index, done.token_ids, done.min_decision_margin, done.logits_digest)
        for done in ended
    )
    assert len(outcomes) == len(rows)
    return hashlib.sha256(repr(outcomes).encode()).hexdigest()


def golden_digests() -> dict[str, str]:
    """Return the digests that the start-up self-test and doctor compare."""
    torch.set_flush_denormal(OPS.flushes)
    try:
        return {
            **{f"golden {cache_dtype}": golden_digest(cache_dtype) for cache_dtype in CACHE_DTYPES},
            **{f"demo {cache_dtype}": demo_digest(cache_dtype) for cache_dtype in CACHE_DTYPES},
        }
    finally:
        torch.set_flush_denormal(False)


def model_digests() -> dict[str, str]:
    """Run the demo, odd shapes with every activation, and the widths of gpt2."""
    found = {}
    demo = find_checkpoint("bundled:demo/model")
    config = parse_config(demo.config, "config.json")
    for cache_dtype in CACHE_DTYPES:
        model = load_gpt(
            config,
            list(demo.weights),
            dtype=torch.float32,
            device=torch.device("cpu"),
            backend=BACKENDS["ragged"],
            cache_dtype=cache_dtype,
        )
        rows = prompts(config.vocab_size, (1, 7, 30, 64, 100), 12)
        found[f"rows of the demo {cache_dtype}"] = engine_digest(model, rows)
        for activation in ACTIVATION_FUNCTIONS:
            odd = config_of(ODD_SHAPE, activation)
            rows = prompts(odd.vocab_size, (1, 3, 63, 150, 250), 20)
            found[f"odd {activation} {cache_dtype}"] = engine_digest(
                random_gpt(odd, cache_dtype), rows
            )
        gpt2 = config_of(GPT2_SHAPE, "gelu_new")
        rows = prompts(gpt2.vocab_size, (1, 5, 9, 17, 70), 4)
        found[f"gpt2 {cache_dtype}"] = engine_digest(random_gpt(gpt2, cache_dtype), rows)
    return found


def use_kernels(sources: Path | None, flags: list[str]) -> None:
    """Build the kernels from other sources, or with more flags, and load them."""
    build_kernels = build.build_kernels
    build.COMMON_FLAGS = (*build.COMMON_FLAGS, *flags)  # type: ignore[assignment]
    if sources is not None:
        other = build.Sources(folder=sources, units=build.KERNELS.units)
        build.build_kernels = lambda folder, _=None: build_kernels(folder, other)  # type: ignore[assignment]
    build.load_kernels()


@torch.inference_mode()
def main() -> None:
    """Print the digests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--flag", action="append", default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--without-vnni", action="store_true")
    parser.add_argument("--flush-denormals", action="store_true")
    parser.add_argument("--golden", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.without_vnni:
        for name in ("_is_vnni_supported", "_is_avx512_bf16_supported"):
            setattr(torch.cpu, name, lambda: False)
    use_kernels(args.sources, args.flag)
    OPS.flushes = args.flush_denormals
    if args.golden:
        print(json.dumps(golden_digests(), indent=4))
        return
    found = linear_digests() | norm_digests() | attention_digests() | sampler_digests()
    # Last: threads that torch starts meanwhile would flush subnormals, in the inputs above, too.
    found |= golden_digests()
    if args.models:
        found |= model_digests()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
