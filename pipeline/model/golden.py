"""Golden digests: whether the C++ kernels compute arithmetic 1 (docs/arithmetic.md) here.

A digest is the SHA-256 of what the kernels compute in float32 from fixed numbers: the logits of a
small network in several chunks, sampled tokens and margins, all activations, and subnormals. The
numbers are made from Philox counters, and all sizes are odd. A machine whose digest is the one here
computes the bits of every other such machine, without having seen it.

Other digests are another arithmetic: they need another version number. `python -m
tests.arithmetic_digests --golden` prints those of this machine.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import RAGGED
from gptbatch.pipeline.model.config import Activation, GPTConfig
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.lm_head import logits_bytes
from gptbatch.pipeline.model.packing import pack
from gptbatch.pipeline.model.philox import philox4x32

ARITHMETIC = 1
# By the dtype of the KV cache, which changes the results.
GOLDEN_DIGESTS: dict[CacheDtype, str] = {
    "auto": "351b453f4425ecba465c7445bfc66f81e8379b8ad1706b0750984d7560ef1bc6",
    "int8": "448e77e3db79fe3430a2fbc6842ef7e0d316596b2083a3aa44a0900c4348ee15",
}
# Of the bundled demo model, by `logits_digest`.
DEMO_DIGESTS: dict[CacheDtype, str] = {
    "auto": "88fd36e6a03045a59cfb8e26685f51170bbb1e6b9f063e2007ec69b01d92a1f1",
    "int8": "766027a09a43148c28d2db081b67328c4b138ac9552f54e8371e217c9007e7d3",
}

CONFIG = GPTConfig(vocab_size=301, n_positions=160, n_embd=39, n_layer=2, n_head=3, n_inner=97)
ACTIVATIONS: tuple[Activation, ...] = ("gelu_tanh", "gelu", "relu", "silu", "tanh")
# The forward passes over two sequences: (sequence, first position, end) of each chunk.
CHUNKS = (
    ((0, 0, 70),),
    ((0, 70, 148), (1, 0, 19)),
    ((1, 19, 20), (0, 148, 149)),
    ((0, 149, 150),),
)
# The rows whose tokens are sampled are those of the second forward pass.
SAMPLED_PASS = 1


@functools.cache
@torch.inference_mode()
def golden_digest(cache_dtype: CacheDtype) -> str:
    """Return the digest that the loaded kernels give."""
    logits = [*_logits_of_chunks(_golden_model(cache_dtype))]
    results = [*logits, *_sample(logits[SAMPLED_PASS]), *_layers()]
    whole = hashlib.sha256()
    for result in results:
        whole.update(logits_bytes(result))
    return whole.hexdigest()


@torch.inference_mode()
def logits_digest(model: GPT) -> str:
    """Return the SHA-256 of the logits of the chunks. The model has at least 150 positions."""
    whole = hashlib.sha256()
    for logits in _logits_of_chunks(model):
        whole.update(logits_bytes(logits))
    return whole.hexdigest()


def why_golden_differs(cache_dtype: CacheDtype) -> str | None:
    """Return why the kernels here do not compute the arithmetic; None if they do."""
    found = golden_digest(cache_dtype)
    if found == GOLDEN_DIGESTS[cache_dtype]:
        return None
    return (
        f"the C++ kernels do not compute arithmetic {ARITHMETIC} here (golden digest "
        f"{found[:12]}..., not {GOLDEN_DIGESTS[cache_dtype][:12]}...); delete the built kernels "
        "(gptbatch doctor names the folder) and build them with another compiler (CXX)"
    )


def why_not_portable(model: GPT) -> str | None:
    """Return why the model does not follow the specification, whatever the machine; or None."""
    if model.device.type != "cpu":
        return f"the device is {model.device.type}: only the C++ kernels, on a CPU, are portable"
    if model.dtype != torch.float32:
        dtype = str(model.dtype).removeprefix("torch.")
        return f"the dtype is {dtype}, whose matrix products differ between CPUs; use float32"
    if not model.backend.native:
        return f"attention is {model.backend.name}, which takes the kernels of torch; use ragged"
    return None


def _golden_model(cache_dtype: CacheDtype) -> GPT:
    """Return the small network. Its parameters are made one after the other, as in `GPT`."""
    model = GPT(CONFIG, backend=RAGGED, cache_dtype=cache_dtype)
    model.eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    numbers = _uniform(0, [parameter.shape for parameter in parameters.values()])
    for (name, parameter), values in zip(parameters.items(), numbers, strict=True):
        is_norm_weight = ".ln_" in f".{name}" and name.endswith("weight")
        parameter.copy_(values / 4 + (1.0 if is_norm_weight else 0.0))
    pack(model)
    return model


def _logits_of_chunks(model: GPT) -> list[Tensor]:
    """Return the logits of all tokens of each forward pass."""
    cache = model.new_cache(2, capacity=model.cache_spec.capacity_for([150, 20]))
    found = []
    for chunks in CHUNKS:
        places = [(seq, position) for seq, first, end in chunks for position in range(first, end)]
        hidden = model.hidden(
            cache,
            tokens=[(i * i + 7 * i + 3 * seq) % model.config.vocab_size for seq, i in places],
            seq_indices=[seq for seq, _ in places],
            positions=[position for _, position in places],
        )
        found.append(model.logits(hidden))
    return found


def _sample(logits: Tensor) -> list[Tensor]:
    """Return tokens, margins and masses of rows with all kinds of settings."""
    count, vocab_size = logits.shape
    rows = range(count)
    temperatures = [(0.0, 0.5, 1.0, 2.0, 1.5)[i % 5] for i in rows]
    kept_sizes = [(vocab_size, 40, vocab_size, 7)[i % 4] for i in rows]
    doubles = torch.float64
    tokens, margins = torch.ops.gptbatch.sample(
        logits,
        torch.tensor([(i * 0x9E3779B97F4A7C15) % 2**63 for i in rows]),
        torch.tensor([*rows]),
        torch.tensor(temperatures, dtype=doubles),
        # Temperature 0 is greedy.
        torch.tensor(
            [size if t > 0 else 1 for size, t in zip(kept_sizes, temperatures, strict=True)]
        ),
        torch.tensor(
            [3 * t if i % 7 == 3 and t > 0 else math.inf for i, t in enumerate(temperatures)],
            dtype=doubles,
        ),
        torch.tensor(
            [(1.0, 0.9, 1.0)[i % 3] if t > 0 else 1.0 for i, t in enumerate(temperatures)],
            dtype=doubles,
        ),
        torch.full((count,), math.inf, dtype=doubles),
    )
    return [tokens, margins, *torch.ops.gptbatch.total_masses(logits)]


def _layers() -> list[Tensor]:
    """Return what single layers give: every activation, and layers of subnormal numbers."""
    ops = torch.ops.gptbatch
    x, weight, bias, others = _uniform(1, [(33, 39), (47, 39), (47,), (33, 39)])
    packed = ops.pack_weight(weight)
    activated = [ops.linear(x * 4, packed, 47, bias, None, name) for name in ACTIVATIONS]
    # The bits of whole numbers below 2^23 are those of subnormal numbers.
    tiny = (others.abs() * 2**23).int().view(torch.float32)
    indices = torch.arange(33)
    return [
        *activated,
        ops.linear(x * 2**-63, ops.pack_weight(weight * 2**-63), 47, None, None, "none"),
        ops.layer_norm(tiny, weight[0], bias[:39].contiguous() * 2**-100, 1e-30),
        ops.embed(indices, indices.flip(0), tiny, tiny),
    ]


def _uniform(key: int, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return tensors of multiples of 2^-23 from -1 up to 1 in float32.

    Number i of all of them is made of the upper 24 bits of word i % 4 of Philox4x32-10, with the
    counter (i // 4, 0, 0, 0) and the key (key, 0).
    """
    counts = [math.prod(shape) for shape in shapes]
    count = sum(counts)
    counters, zero = torch.arange(-(-count // 4)), torch.zeros(1, dtype=torch.int64)
    words = philox4x32((counters, zero, zero, zero), (zero + key, zero))
    bits = torch.stack(words, dim=1).flatten()[:count] >> 8
    numbers = (bits - 2**23).to(torch.float32) * 2.0**-23
    return [x.view(*shape) for x, shape in zip(numbers.split(counts), shapes, strict=True)]
