"""The start-up check: on this machine, with these weights, are a row's bits the same whatever runs beside it?

Fixed tokens go through the loaded network, and fixed numbers through its linears and its attention: alone and among others, at
other places, in other chunks, at few and many rows, with one and with all threads. All must agree bit for bit. Where they do
not, padded attention is tried without matrix products (padded.py), and the linears at other row counts (linear.py, PADDING_PLANS), the last
of them each at its own, before it gives up. A two_pass_head of the head that does not compute the head's logits is left out.

Knows: the network. Does not know: what a failure means for a run.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbatch.pipeline.engine.engine import STEP_TOKENS, logits_bytes
from gptbatch.pipeline.model.blocks import Block
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.linear import Linear, use_threads
from gptbatch.pipeline.model.lm_head import HEAD_ROWS

logger = logging.getLogger("gptbatch")

NEEDLE_TOKENS = 24
FILLERS = (5, 17, 1, 9)  # tokens of the sequences beside the needle
CHUNKS = (
    1,
    2,
    8,
)  # tokens of the first calls that take the needle in pieces; one more takes the rest
ATTENTION_POSITIONS = (
    1024  # products over more than 192 keys have been seen to change their order of summing
)
CHUNK = 21
BLOCK_STRIDE = 17  # from one position to the next of which a whole block is computed: so they stand at many places of a page
TWO_PASS_ROWS = 8
MOST_ROWS = 2 * STEP_TOKENS
FEW_ROWS = 64  # below, every number of rows that a block's linear may run at is tried: libraries choose their path by it, and
MANY_ROWS = (80, 96, 128, 160, 192, 256, 320, 512, 768)  # above, some
FEW_ROWS_OF_HEAD = (
    *range(1, 17),
    *range(23, 64, 8),
)  # it is much work; oneDNN's plans round these to all that there are
THREADS = (1, 2, 3, 4)  # whatever the run has: what the check finds must not depend on that
THREADS_ROWS = (1, 24, 200)
MAX_DIGEST_BYTES = 2**21  # of each tensor that enters the digest


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestReport:
    """What the check found. failures: what differed, empty when the machine is exact. padding_plan: the plan in use from now on.

    self_test_digest: SHA-256 over the bits of the needle's logits in every way that they were computed. In 16 bits, where most sums
    round to the same logits, whatever their order, the results of linears and attention over random numbers enter it too.
    """

    failures: tuple[str, ...]
    padding_plan: str
    self_test_digest: str

    @property
    def passed(self) -> bool:
        return not self.failures


@torch.inference_mode()
def select_batch_invariant_kernels(model: GPT) -> SelfTestReport:
    """Check the network on its device, and leave it with the fastest products and row plan that pass; with the fastest if none does."""
    for reduction_order in model.reduction_orders:
        model.reduction_order = reduction_order
        attention = _Probe()
        _check_attention(model, attention)
        if attention.failures:
            continue
        for plan in model.padding_plans:
            model.use_padding_plan(plan)
            probe = _Probe(attention)
            _check_linears(model, probe)
            if not probe.failures:
                _check_network(model, probe)
            if not probe.failures:
                _check_two_pass_head(model)
                return _report(model, probe)
    model.reduction_order = model.reduction_orders[0]
    model.use_padding_plan(model.padding_plans[0])
    probe = _Probe()
    for check in (_check_linears, _check_network, _check_attention):
        check(model, probe)
    return _report(model, probe)


class _Probe:
    """Collects what differed, and the digest, which goes on from that of another probe."""

    def __init__(self, other: _Probe | None = None) -> None:
        self.digest: hashlib._Hash = hashlib.sha256() if other is None else other.digest.copy()
        self.failures: list[str] = []

    def record(self, bits: Tensor) -> None:
        """Take rows of a result over random numbers into the digest, where it is of 16 bits; those of float32 differ in the logits."""
        if bits.dtype != torch.float32:
            rows = max(1, MAX_DIGEST_BYTES // (bits[0].numel() * bits.element_size()))
            self.digest.update(logits_bytes(bits[:rows]))

    def expect(self, what: str, bits: Tensor, expected: Tensor) -> None:
        if not torch.equal(bits, expected) and what not in self.failures:
            self.failures.append(what)


def _report(model: GPT, probe: _Probe) -> SelfTestReport:
    return SelfTestReport(
        failures=tuple(probe.failures),
        padding_plan=model.padding_plan_name,
        self_test_digest=probe.digest.hexdigest(),
    )


def _check_network(model: GPT, probe: _Probe) -> None:
    vocab_size, n_positions = model.config.vocab_size, model.config.n_positions
    needle = _token_ids(0, min(NEEDLE_TOKENS, n_positions), vocab_size)
    count = len(needle)

    def alone() -> Tensor:
        return model.extend(
            model.new_cache(1, capacity=model.capacity_of([count])),
            tokens=needle,
            seq_indices=[0] * count,
            positions=range(count),
        )

    def among_others() -> Tensor:
        sequences = [
            _token_ids(i + 1, min(length, n_positions), vocab_size)
            for i, length in enumerate(FILLERS)
        ]
        sequences.insert(2, needle)
        order = [3, 2, 4, 0, 1]  # of the seq_indices in the call
        first = len(sequences[3])
        return model.extend(
            model.new_cache(len(sequences), capacity=model.capacity_of(map(len, sequences))),
            tokens=[token for seq_index in order for token in sequences[seq_index]],
            seq_indices=[seq_index for seq_index in order for _ in sequences[seq_index]],
            positions=[
                position for seq_index in order for position in range(len(sequences[seq_index]))
            ],
            logits_indices=range(first, first + count),
        )

    def in_chunks() -> Tensor:
        """The needle in seq_index 1, its last token in a call of 33 sequences."""
        cache = model.new_cache(33, capacity=model.capacity_of([count] * 33))
        pieces = []
        start = 0
        for size in (*CHUNKS, count):
            end = min(start + size, count - 1)
            if end > start:
                pieces.append(
                    model.extend(
                        cache,
                        tokens=needle[start:end],
                        seq_indices=[1] * (end - start),
                        positions=range(start, end),
                    )
                )
            start = end
        last = model.extend(
            cache,
            tokens=[
                needle[-1] if seq_index == 1 else seq_index % vocab_size for seq_index in range(33)
            ],
            seq_indices=range(33),
            positions=[count - 1 if seq_index == 1 else 0 for seq_index in range(33)],
            logits_indices=[1],
        )
        return torch.cat([*pieces, last])

    expected = alone()
    probe.digest.update(logits_bytes(expected))
    ways = [("among others", among_others), ("in chunks", in_chunks)]
    for what, way in ways:
        bits = way()
        probe.digest.update(logits_bytes(bits))
        probe.expect(f"logits {what}", bits, expected)
    if model.device.type == "cpu":
        with use_threads(1):
            for what, way in (("alone", alone), ("among others", among_others)):
                bits = way()
                probe.digest.update(logits_bytes(bits))
                probe.expect(f"logits {what} with one thread", bits, expected)


def _check_two_pass_head(model: GPT) -> None:
    """A two_pass_head whose logits are not those of the head, where it says so, is not used: nothing but time is lost."""
    if (two_pass_head := model.two_pass_head) is None:
        return
    hidden = _numbers((TWO_PASS_ROWS, model.config.n_embd), model)
    logits, roughly = model.logits(hidden), two_pass_head.approximate_logits(hidden)
    kept = torch.tensor([1, 5] * (TWO_PASS_ROWS // 2))
    floors = two_pass_head.rescore(
        roughly, hidden, kept, torch.full((TWO_PASS_ROWS,), 0.1, dtype=torch.float64)
    )[:, None]
    exact = (torch.maximum(logits, roughly) < floors) | (logits == roughly) | floors.isnan()
    two_pass_head.rows = two_pass_head.missed = 0
    if not bool(exact.all()):
        logger.info(
            "the two_pass_head of the head computes other logits than the head here, and is left out"
        )
        model.two_pass_head = None


def _check_linears(model: GPT, probe: _Probe) -> None:
    """Each at the row counts of the plan; where these are constant, at the largest that passes, which it is left with."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    for name, linear in (*block.named_children(), ("lm_head", model.lm_head)):
        if not isinstance(linear, Linear):
            continue
        count = HEAD_ROWS if linear is model.lm_head else MOST_ROWS
        failures, bits = _failures_of(linear, name, count, model)
        for rows in model.padding_plan.constant[1:]:
            if not failures:
                break
            model.use_fixed_rows(name, rows)
            failures, bits = _failures_of(linear, name, count, model)
        probe.failures += failures
        probe.record(bits)


def _failures_of(linear: Linear, name: str, count: int, model: GPT) -> tuple[list[str], Tensor]:
    """What differs at as many rows as a call of a run has, against few of them at other places, and with other threads; and the
    result at all rows.
    """
    x = _numbers((count, linear.in_features), model)
    adds = linear.activation == "none" and linear.bias is not None
    residual = _numbers((count, linear.out_features), model) if adds else None

    def run(part: slice) -> Tensor:
        y: Tensor = linear(
            x[part].contiguous(), None if residual is None else residual[part].contiguous()
        )
        return y

    expected = linear(x, residual)
    plan = model.padding_plan
    few = FEW_ROWS_OF_HEAD if linear is model.lm_head else range(1, FEW_ROWS + 1)
    counts = {
        plan.rows(logits_indices)
        for logits_indices in (*few, *MANY_ROWS)
        if logits_indices <= count
    }
    parts = [
        slice(first, first + rows)
        for first, rows in (
            (50, plan.rows(17)),
            (37, plan.rows(count // 3)),
            *((0, n) for n in counts),
        )
    ]
    failures = (
        [] if all(torch.equal(run(part), expected[part]) for part in parts) else [f"rows of {name}"]
    )
    if model.device.type == "cpu":
        parts = [slice(0, plan.rows(min(logits_indices, count))) for logits_indices in THREADS_ROWS]
        for threads in THREADS:
            with use_threads(threads):
                if not all(torch.equal(run(part), expected[part]) for part in parts):
                    failures.append(f"{name} with other threads")
                    break
    return failures, expected


def _check_attention(model: GPT, probe: _Probe) -> None:
    """One layer over as long a context as may be, in one call, against some of its positions in other calls; and the block,
    in one call and operator by operator.

    Both seq_indices hold the same tokens, so that a position has one right answer. A call may take positions again.
    """
    count = min(ATTENTION_POSITIONS, model.config.n_positions)
    block, scale = model.blocks[0], model.config.attention_scale(0)
    assert isinstance(block, Block)
    x = _numbers((model.padding_plan.rows(count), model.config.n_embd), model)
    qkv = block.attn_qkv(x)[:count]
    cache = model.new_cache(2)

    def attend(seq_indices: list[int], positions: list[int]) -> Tensor:
        return cache.step(seq_indices, positions)(0, qkv[positions], scale)

    expected = attend([1] * count, list(range(count)))
    probe.record(expected)
    early, last = min(10, count), count - 1
    calls = [
        ("in another seq_index", [0] * early, list(range(early))),
        ("alone", [1], [last]),
        ("beside others", [0, 1], [early - 1, last]),
    ]
    for first in (0, count // 5, max(0, count - CHUNK)):
        positions = list(range(first, min(first + CHUNK, count)))
        calls.append(("in chunks", [1] * len(positions), positions))
    for what, seq_indices, positions in calls:
        probe.expect(f"attention {what}", attend(seq_indices, positions), expected[positions])
        if model.device.type == "cpu":
            with use_threads(1):
                probe.expect(
                    f"attention {what} with one thread",
                    attend(seq_indices, positions),
                    expected[positions],
                )
    if model.blocks.in_one_call:  # last, for it writes other keys and values
        some = torch.arange(last, -1, -BLOCK_STRIDE)
        attention = cache.step([1] * count, list(range(count)))
        in_order = block(x, attention, some)
        probe.record(in_order)
        probe.expect("a block in one call", model.blocks[:1](x, attention, some), in_order)
        with use_threads(1):
            probe.expect(
                "a block in one call with one thread",
                model.blocks[:1](x, attention, some),
                in_order,
            )


def _token_ids(sequence: int, count: int, vocab_size: int) -> list[int]:
    """Token ids that stand fixed: part of what the probe digest means."""
    return [(7919 * (sequence + 1) * (i + 1) + 104729 * i * i) % vocab_size for i in range(count)]


def _numbers(shape: tuple[int, int], model: GPT) -> Tensor:
    generator = torch.Generator().manual_seed(shape[1])
    return torch.randn(shape, generator=generator).to(device=model.device, dtype=model.dtype)
