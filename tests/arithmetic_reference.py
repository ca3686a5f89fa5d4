"""Arithmetic 1 in numpy: logits of a GPT-2 in float32, bit for bit those of the C++ kernels.

docs/arithmetic.md is the specification, and this its plainest program. It knows neither vectors nor
blocks of a cache. Arrays only run independent sums beside each other; every sum is a loop over its
elements in the order of the specification.

Shapes: T tokens of one sequence, C = n_embd, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gptbatch.pipeline.model.config import Activation

Floats = np.ndarray[Any, np.dtype[np.float32]]
Numbers = Floats | np.float32
f32, f64 = np.float32, np.float64

LANES = 32
KEYS_PER_STEP = 64  # with the int8 cache
MIN_ABSMAX = f32(1e-30)
MAX_INT16 = 32639
EXP = (1.0, 1.0, 0.49999994, 0.166665211, 0.0416682661, 0.00836867746, 0.00138207339)
TANH = (-0.333332807, 0.133314088, -0.0537370592, 0.0206308626, -0.00569625339)
ERF_SMALL = (
    *(0.128379166, -0.376126289, 0.112836257, -0.0268557277, 0.00519237714),
    *(-0.000804917421, 7.99279587e-05),
)
ERF_LARGE = (
    *(-1.12864959, -0.635146856, -0.106244221, 0.0237683542, -0.00364541402),
    *(0.000323524728, -1.13025981e-05),
)


def fma(a: Numbers, b: Numbers, c: Numbers) -> Floats:
    """Return a * b + c, rounded once.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond 2008).
    """
    product, addend = np.asarray(a, f64) * np.asarray(b, f64), np.asarray(c, f64)
    total = np.asarray(product + addend)
    rounded = total - product
    error = (product - (total - rounded)) + (addend - rounded)
    bits = total.view(np.int64)
    to_odd = (error != 0) & (bits % 2 == 0)
    away = (error > 0) == (total > 0)
    odd = (bits + np.where(to_odd, np.where(away, 1, -1), 0)).view(f64)
    return np.asarray(odd, dtype=f32)


def chain(a: Floats, b: Floats) -> Floats:
    """Sum a[..., i] * b[..., i] over i by fma, from 0."""
    total = np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1], f32)
    for i in range(a.shape[-1]):
        total = fma(a[..., i], b[..., i], total)
    return total


def sum_over_lanes(x: Floats) -> Floats:
    """Sum over the last axis: element i to lane i % 32, then a fixed tree."""
    lanes = np.zeros((*x.shape[:-1], LANES), f32)
    for i in range(x.shape[-1]):
        lanes[..., i % LANES] += x[..., i]
    n = LANES // 2
    while n:
        lanes = lanes[..., :n] + lanes[..., n : 2 * n]
        n //= 2
    return np.asarray(lanes[..., 0])


def polynomial(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """Evaluate by Horner's rule; the lowest coefficient stands first."""
    total = np.full_like(x, f32(coefficients[-1]))
    for c in coefficients[-2::-1]:
        total = fma(total, x, f32(c))
    return total


def exp(x: Floats) -> Floats:
    """Return exp of numbers up to 88.375; larger ones count as that."""
    x = np.clip(x, f32(-88), f32(88.375))
    t = fma(x, f32(1.44269502), f32(12583039))
    n = t - f32(12583039)
    r = fma(n, f32(1.90465421e-9), fma(n, f32(-0.693147182), x))
    scale = (t.view(np.uint32) << np.uint32(23)).view(f32)
    return np.asarray(polynomial(EXP, r) * scale)


def tanh(x: Floats) -> Floats:
    """Return tanh."""
    square = x * x
    small = fma(polynomial(TANH, square), square * x, x)
    large = f32(1) - f32(2) / (exp(f32(2) * np.abs(x)) + f32(1))
    return np.where(np.abs(x) < f32(0.625), small, np.copysign(large, x))


def erf(x: Floats) -> Floats:
    """Return erf."""
    size = np.minimum(np.abs(x), f32(4))
    small = fma(polynomial(ERF_SMALL, x * x), x, x)
    large = f32(1) - exp(size * polynomial(ERF_LARGE, size))
    return np.where(size < f32(0.921875), small, np.copysign(large, x))


def activate(activation: Activation, x: Floats) -> Floats:
    """Apply the activation of the MLP."""
    if activation == "gelu_tanh":
        z = f32(1.5957691216057308) * (x + f32(0.044715) * x * x * x)
        return x / (f32(1) + exp(-z))
    if activation == "gelu":
        return f32(0.5) * x * (f32(1) + erf(x * f32(0.70710678)))
    if activation == "silu":
        return x / (f32(1) + exp(-x))
    return tanh(x) if activation == "tanh" else np.maximum(x, f32(0))


def layer_norm(x: Floats, weight: Floats, bias: Floats, epsilon: float) -> Floats:
    """Normalize the rows of x (T, C)."""
    mean = (sum_over_lanes(x) / f32(x.shape[1]))[:, None]
    variance = np.asarray(sum_over_lanes((x - mean) * (x - mean)), f64) / x.shape[1]
    factor = np.asarray(1 / np.sqrt(variance + epsilon), f32)[:, None]
    return np.asarray((x - mean) * factor * weight + bias, f32)


def linear(x: Floats, weight: Floats) -> Floats:
    """Multiply x (T, in) by the transpose of weight (out, in)."""
    return chain(x[:, None], weight[None])


def quantize(x: Floats, largest: int) -> tuple[Floats, Floats]:
    """Return whole numbers of at most `largest` for rows of x (..., n), and their scales (...)."""
    absmax = np.abs(x).max(axis=-1, keepdims=True)
    factor = np.where(absmax < MIN_ABSMAX, f32(0), f32(largest) / np.maximum(absmax, MIN_ABSMAX))
    return np.rint(x * factor), np.asarray((absmax / f32(largest))[..., 0])


def dot(a: Floats, b: Floats) -> Floats:
    """Return the exact dot product of whole numbers, rounded once."""
    return np.asarray((np.asarray(a, f64) * np.asarray(b, f64)).sum(axis=-1), f32)


def attend(q: Floats, keys: Floats, values: Floats, scale: np.float32, *, int8: bool) -> Floats:
    """Attend with a query (H, D) over keys and values (H, K, D): -> (H, D)."""
    size = q.shape[-1]
    largest = min(MAX_INT16, (2**31 - 1) // (128 * -(-size // 32) * 32))
    maximum, total = np.full(len(q), -np.inf, f32), np.zeros(len(q), f32)
    out = np.zeros(q.shape, f32)
    keys_per_step = KEYS_PER_STEP if int8 else keys.shape[1]
    for first in range(0, keys.shape[1], keys_per_step):
        k, v = (x[:, first : first + keys_per_step] for x in (keys, values))
        if int8:
            (q_int, q_scale), (k_int, k_scale) = quantize(q, largest), quantize(k, 127)
            scores = dot(q_int[:, None], k_int) * (k_scale * (scale * q_scale)[:, None])
        else:
            even, odd = (chain(q[:, None, i::2], k[..., i::2]) for i in (0, 1))
            scores = (even + odd) * scale
        new_maximum = np.maximum(maximum, scores.max(axis=1))
        decay = exp(maximum - new_maximum)
        weights = exp(scores - new_maximum[:, None])
        total = total * decay + sum_over_lanes(weights)
        out = out * decay[:, None]
        if int8:
            v_int, v_scale = quantize(v, 127)
            w_int, w_scale = quantize(weights * v_scale, MAX_INT16)
            sums = dot(w_int[:, None], v_int.transpose(0, 2, 1))
            out = fma(sums, w_scale[:, None], out)
        else:
            for i in range(k.shape[1]):
                out = fma(weights[:, i, None], v[:, i], out)
        maximum = new_maximum
    return out * (f32(1) / total)[:, None]


def logits(
    weights: Mapping[str, Floats],
    tokens: list[int],
    *,
    n_layer: int,
    n_head: int,
    activation: Activation,
    epsilon: float,
    int8: bool,
) -> Floats:
    """Return the logits (T, V) of a GPT-2 whose head is the token embedding.

    Args:
        weights: Parameters of `GPT` by name.
        tokens: Token ids (T,).
        n_layer: Number of blocks.
        n_head: Number of heads.
        activation: Of the MLP.
        epsilon: Of the layer norms.
        int8: The cache is int8.
    """
    count = len(tokens)
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][:count]
    size = x.shape[1] // n_head
    scale = f32(size**-0.5)
    for layer in range(n_layer):

        def part(name: str, layer: int = layer) -> tuple[Floats, Floats]:
            return tuple(weights[f"blocks.{layer}.{name}.{kind}"] for kind in ("weight", "bias"))  # type: ignore[return-value]

        weight, bias = part("attn_qkv")
        qkv = linear(layer_norm(x, *part("ln_1"), epsilon), weight) + bias
        q, k, v = qkv.reshape(count, 3, n_head, size).transpose(1, 0, 2, 3)
        attended = np.stack(
            [
                attend(
                    q[t],
                    k[: t + 1].transpose(1, 0, 2),
                    v[: t + 1].transpose(1, 0, 2),
                    scale,
                    int8=int8,
                ).ravel()
                for t in range(count)
            ]
        )
        weight, bias = part("attn_out")
        x = (linear(attended, weight) + bias) + x
        weight, bias = part("mlp_in")
        inner = activate(activation, linear(layer_norm(x, *part("ln_2"), epsilon), weight) + bias)
        weight, bias = part("mlp_out")
        x = (linear(inner, weight) + bias) + x
    x = layer_norm(x, weights["ln_f.weight"], weights["ln_f.bias"], epsilon)
    return linear(x, weights["wte.weight"])
