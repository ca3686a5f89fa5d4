"""The batch-invariance self-test: select kernels whose bits do not depend on the batch.

It runs at start-up. Fixed tokens pass through the loaded model, and fixed numbers through its
linears and its attention: alone and batched, at other indices, in chunks, at small and large row
counts, with one thread and with all. All results of a position must be equal bit for bit. Where
they are not, the next choice is tried: the `pairwise` reduction order of padded attention, then the
padding plans of the linears (padding.py). Under `fixed_64` each linear gets the largest row count
that passes. A two-pass head whose exact logits are not the head's is dropped.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.model.linear import Linear, use_threads
from gptbatch.pipeline.model.lm_head import MAX_HEAD_ROWS, logits_bytes
from gptbatch.pipeline.model.packing import (
    describe_padding,
    padding_plans,
    use_fixed_rows,
    use_padding_plan,
)
from gptbatch.pipeline.model.padding import STEP_TOKENS

logger = logging.getLogger("gptbatch")

# Tokens of the tested sequence, and of the sequences batched with it.
TEST_TOKENS = 24
OTHER_LENGTHS = (5, 17, 1, 9)
# Lengths of the first chunks of the tested sequence; one more chunk takes the rest.
CHUNK_LENGTHS = (1, 2, 8)
# Sequences of the forward pass that decodes the last token.
DECODE_SEQS = 33
# Products over more than 192 keys were seen to change their reduction order.
ATTENTION_POSITIONS = 1024
ATTENTION_CHUNK = 21
# Distance between positions of a whole block that are compared: many offsets in a cache block.
BLOCK_STRIDE = 17
TWO_PASS_ROWS = 8
MAX_ROWS = 2 * STEP_TOKENS
# Every row count up to this is tried with a block's linears: libraries pick kernels by it.
MAX_SMALL_ROWS = 64
LARGE_ROWS = (80, 96, 128, 160, 192, 256, 320, 512, 768)
# Fewer row counts for the head, which is expensive. oneDNN's plans round them to all counts.
SMALL_HEAD_ROWS = (*range(1, 17), *range(23, 64, 8))
# Fixed thread counts: the result must not depend on those of the run.
THREADS = (1, 2, 3, 4)
THREADS_ROWS = (1, 24, 200)
# Bytes of each tensor that enter the digest.
MAX_DIGEST_BYTES = 2**21


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestReport:
    """Result of the self-test.

    Attributes:
        failures: What differed; empty if all bits are equal.
        padding_plan: The plan in use from now on.
        self_test_digest: SHA-256 of all logits of the tested sequence. With 16-bit dtypes it also
            covers linears and attention, because most reduction orders round to the same logits.
    """

    failures: tuple[str, ...]
    padding_plan: str
    self_test_digest: str

    @property
    def passed(self) -> bool:
        """Whether nothing differed."""
        return not self.failures


@torch.inference_mode()
def select_batch_invariant_kernels(model: GPT) -> SelfTestReport:
    """Test the model on its device and select the fastest kernels that pass.

    The model keeps the selected reduction order and padding plan; the fastest ones if none passes.
    """
    for reduction_order in model.backend.reduction_orders:
        model.reduction_order = reduction_order
        attention_probe = _Probe()
        _check_attention(model, attention_probe)
        if attention_probe.failures:
            continue
        for plan in padding_plans(model):
            use_padding_plan(model, plan)
            probe = _Probe(attention_probe)
            _check_linears(model, probe)
            if not probe.failures:
                _check_model(model, probe)
            if not probe.failures:
                _check_two_pass_head(model)
                return _report(model, probe)
    model.reduction_order = model.backend.reduction_orders[0]
    use_padding_plan(model, padding_plans(model)[0])
    probe = _Probe()
    for check in (_check_linears, _check_model, _check_attention):
        check(model, probe)
    return _report(model, probe)


class _Probe:
    """Failures and the digest so far. A probe may continue the digest of another."""

    def __init__(self, other: _Probe | None = None) -> None:
        self.digest: hashlib._Hash = hashlib.sha256() if other is None else other.digest.copy()
        self.failures: list[str] = []

    def record(self, result: Tensor) -> None:
        """Add a 16-bit result to the digest; float32 results already show in the logits."""
        if result.dtype != torch.float32:
            rows = max(1, MAX_DIGEST_BYTES // (result[0].numel() * result.element_size()))
            self.digest.update(logits_bytes(result[:rows]))

    def expect(self, what: str, result: Tensor, expected: Tensor) -> None:
        """Add `what` to the failures unless the tensors are equal."""
        if not torch.equal(result, expected) and what not in self.failures:
            self.failures.append(what)

    def expect_logits(self, what: str, result: Tensor, expected: Tensor) -> None:
        """Add logits to the digest and compare them."""
        self.digest.update(logits_bytes(result))
        self.expect(f"logits {what}", result, expected)


def _report(model: GPT, probe: _Probe) -> SelfTestReport:
    return SelfTestReport(
        failures=tuple(probe.failures),
        padding_plan=describe_padding(model),
        self_test_digest=probe.digest.hexdigest(),
    )


def _check_model(model: GPT, probe: _Probe) -> None:
    """Compare the logits of one sequence alone, batched and in chunks."""
    tokens = _token_ids(0, min(TEST_TOKENS, model.config.n_positions), model.config.vocab_size)
    expected = _logits_alone(model, tokens)
    probe.digest.update(logits_bytes(expected))
    probe.expect_logits("among others", _logits_among_others(model, tokens), expected)
    probe.expect_logits("in chunks", _logits_in_chunks(model, tokens), expected)
    if model.device.type == "cpu":
        with use_threads(1):
            probe.expect_logits("alone with one thread", _logits_alone(model, tokens), expected)
            probe.expect_logits(
                "among others with one thread", _logits_among_others(model, tokens), expected
            )


def _logits_alone(model: GPT, tokens: list[int]) -> Tensor:
    count = len(tokens)
    cache = model.new_cache(1, capacity=model.cache_spec.capacity_for([count]))
    return model.logits(
        model.hidden(cache, tokens=tokens, seq_indices=[0] * count, positions=range(count))
    )


def _logits_among_others(model: GPT, tokens: list[int]) -> Tensor:
    """Return the logits of the tokens as sequence 2 of five, prefilled in one forward pass."""
    vocab_size, n_positions = model.config.vocab_size, model.config.n_positions
    sequences = [
        _token_ids(i + 1, min(length, n_positions), vocab_size)
        for i, length in enumerate(OTHER_LENGTHS)
    ]
    sequences.insert(2, tokens)
    order = [3, 2, 4, 0, 1]
    first = len(sequences[3])
    capacity = model.cache_spec.capacity_for(map(len, sequences))
    hidden = model.hidden(
        model.new_cache(len(sequences), capacity=capacity),
        tokens=[token for seq_index in order for token in sequences[seq_index]],
        seq_indices=[seq_index for seq_index in order for _ in sequences[seq_index]],
        positions=[
            position for seq_index in order for position in range(len(sequences[seq_index]))
        ],
        logits_indices=range(first, first + len(tokens)),
    )
    return model.logits(hidden)


def _logits_in_chunks(model: GPT, tokens: list[int]) -> Tensor:
    """Return the logits of the tokens as sequence 1: prefilled in chunks, the last one decoded."""
    count = len(tokens)
    capacity = model.cache_spec.capacity_for([count] * DECODE_SEQS)
    cache = model.new_cache(DECODE_SEQS, capacity=capacity)
    pieces = []
    start = 0
    for size in (*CHUNK_LENGTHS, count):
        end = min(start + size, count - 1)
        if end > start:
            hidden = model.hidden(
                cache,
                tokens=tokens[start:end],
                seq_indices=[1] * (end - start),
                positions=range(start, end),
            )
            pieces.append(model.logits(hidden))
        start = end
    seq_indices = range(DECODE_SEQS)
    hidden = model.hidden(
        cache,
        tokens=[tokens[-1] if i == 1 else i % model.config.vocab_size for i in seq_indices],
        seq_indices=seq_indices,
        positions=[count - 1 if i == 1 else 0 for i in seq_indices],
        logits_indices=[1],
    )
    return torch.cat([*pieces, model.logits(hidden)])


def _check_two_pass_head(model: GPT) -> None:
    """Drop a two-pass head whose exact logits are not the head's. This only costs time."""
    two_pass_head = model.two_pass_head
    if two_pass_head is None:
        return
    hidden = _numbers((TWO_PASS_ROWS, model.config.n_embd), model)
    expected, logits = model.logits(hidden), two_pass_head.approximate_logits(hidden)
    kept_sizes = torch.tensor([1, 5] * (TWO_PASS_ROWS // 2))
    exact_ranges = torch.full((TWO_PASS_ROWS,), 0.1, dtype=torch.float64)
    thresholds = two_pass_head.rescore(logits, hidden, kept_sizes, exact_ranges)[:, None]
    is_below = torch.maximum(expected, logits) < thresholds
    is_right = is_below | (expected == logits) | thresholds.isnan()
    two_pass_head.n_rows = two_pass_head.n_fallbacks = 0
    if not bool(is_right.all()):
        logger.info("the two-pass head computes other logits than the head here; it is not used")
        model.two_pass_head = None


def _check_linears(model: GPT, probe: _Probe) -> None:
    """Check each linear under the plan; with fixed rows, select the largest count that passes."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    for name, linear in (*block.named_children(), ("lm_head", model.lm_head)):
        if not isinstance(linear, Linear):
            continue
        failures, result = _check_linear(model, name, linear)
        for rows in model.padding_plan.fixed_rows[1:]:
            if not failures:
                break
            use_fixed_rows(model, name, rows)
            failures, result = _check_linear(model, name, linear)
        probe.failures += failures
        probe.record(result)


def _check_linear(model: GPT, name: str, linear: Linear) -> tuple[list[str], Tensor]:
    """Compare the largest call with calls of other row counts, offsets and thread counts.

    Returns:
        The failures, and the result of the largest call.
    """
    is_head = linear is model.lm_head
    # The engine of the device computes the logits of all rows at once.
    count = MAX_HEAD_ROWS if is_head and not model.backend.triton else MAX_ROWS
    x = _numbers((count, linear.in_features), model)
    takes_residual = linear.activation == "none" and linear.bias is not None
    if model.backend.triton:
        # No more kernels than a run launches, because each is compiled.
        takes_residual = name in ("attn_out", "mlp_out")
    residual = _numbers((count, linear.out_features), model) if takes_residual else None
    expected = linear(x, residual)

    def differs(part: slice) -> bool:
        part_residual = None if residual is None else residual[part].contiguous()
        return not torch.equal(linear(x[part].contiguous(), part_residual), expected[part])

    failures = []
    if any(differs(part) for part in _row_slices(model, count, is_head=is_head)):
        failures.append(f"rows of {name}")
    if model.device.type == "cpu":
        parts = [slice(0, model.padding_plan.padded(min(rows, count))) for rows in THREADS_ROWS]
        for threads in THREADS:
            with use_threads(threads):
                if any(differs(part) for part in parts):
                    failures.append(f"{name} with other threads")
                    break
    return failures, expected


def _row_slices(model: GPT, count: int, *, is_head: bool) -> list[slice]:
    """Return the rows of the smaller calls: two at an offset, and every tested row count."""
    plan = model.padding_plan
    small: Sequence[int] = SMALL_HEAD_ROWS if is_head else range(1, MAX_SMALL_ROWS + 1)
    counts = {plan.padded(rows) for rows in (*small, *LARGE_ROWS) if rows <= count}
    return [
        slice(50, 50 + plan.padded(17)),
        slice(37, 37 + plan.padded(count // 3)),
        *(slice(0, rows) for rows in counts),
    ]


def _check_attention(model: GPT, probe: _Probe) -> None:
    """Compare attention over one long prefill with shorter calls, and the fused block with both.

    Sequences 0 and 1 hold the same tokens, so every position has one right result. A call may
    repeat positions.
    """
    count = min(ATTENTION_POSITIONS, model.config.n_positions)
    block, scale = model.blocks[0], model.config.attention_scale(0)
    assert isinstance(block, Block)
    x = _numbers((model.padding_plan.padded(count), model.config.n_embd), model)
    qkv = block.attn_qkv(x)[:count]
    cache = model.new_cache(2)

    def attend(seq_indices: list[int], positions: list[int]) -> Tensor:
        return cache.attention_for(seq_indices, positions)(0, qkv[positions], scale)

    expected = attend([1] * count, list(range(count)))
    probe.record(expected)
    for what, seq_indices, positions in _attention_calls(count):
        what = f"attention {what}"
        probe.expect(what, attend(seq_indices, positions), expected[positions])
        if model.device.type == "cpu":
            with use_threads(1):
                result = attend(seq_indices, positions)
                probe.expect(f"{what} with one thread", result, expected[positions])
    if model.blocks.fused is None:
        return
    # Last, because it overwrites the keys and values.
    indices = torch.arange(count - 1, -1, -BLOCK_STRIDE)
    attention = cache.attention_for([1] * count, list(range(count)))
    unfused = block(x, attention, indices)
    probe.record(unfused)
    probe.expect("a block in one call", model.blocks[:1](x, attention, indices), unfused)
    with use_threads(1):
        fused = model.blocks[:1](x, attention, indices)
        probe.expect("a block in one call with one thread", fused, unfused)


def _attention_calls(count: int) -> list[tuple[str, list[int], list[int]]]:
    """Return (description, seq_indices, positions) of the shorter calls."""
    early, last = min(10, count), count - 1
    calls = [
        ("in another sequence", [0] * early, list(range(early))),
        ("alone", [1], [last]),
        ("beside others", [0, 1], [early - 1, last]),
    ]
    for first in (0, count // 5, max(0, count - ATTENTION_CHUNK)):
        positions = list(range(first, min(first + ATTENTION_CHUNK, count)))
        calls.append(("in chunks", [1] * len(positions), positions))
    return calls


def _token_ids(sequence: int, count: int, vocab_size: int) -> list[int]:
    """Return fixed token ids. Changing them changes every self-test digest."""
    return [(7919 * (sequence + 1) * (i + 1) + 104729 * i * i) % vocab_size for i in range(count)]


def _numbers(shape: tuple[int, int], model: GPT) -> Tensor:
    generator = torch.Generator().manual_seed(shape[1])
    return torch.randn(shape, generator=generator).to(device=model.device, dtype=model.dtype)
