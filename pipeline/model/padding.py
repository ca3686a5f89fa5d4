"""Padding plans: at how many rows the GEMMs of a forward pass run.

A row's bits may depend on the number of rows of its GEMM, because libraries pick kernels by shape.
How differs from machine to machine. The batch-invariance self-test takes the first plan under which
no row depends on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

# Default maximum of tokens per forward pass. Large batches may exceed it (`max_step_tokens` of the
# scheduler). The self-test covers twice as many rows.
STEP_TOKENS = 512
# Between multiples of this, row counts are rounded up.
GRAIN_ROWS = 8
# Above this multiple of the grain, the grain doubles.
GRAINS_PER_DOUBLING = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingPlan:
    """The M dimension of the GEMMs.

    Attributes:
        name: Recorded in the environment.
        min_rows: The fewest rows of a GEMM. 1 runs exactly the rows that there are.
        fixed_rows: Run every GEMM in pieces of the first of these row counts. Each linear may use
            one of the others instead. () runs all rows at once.
    """

    name: str
    min_rows: int
    fixed_rows: tuple[int, ...] = ()

    def padded(self, rows: int) -> int:
        """Return the number of rows to run for `rows` >= 1.

        Without fixed_rows this adds at most 7 rows, or one eighth above 128. oneDNN builds and
        keeps a kernel of about half a megabyte for every row count: without rounding, a run with
        batches of every size would slow down for each new one and hold a gigabyte in the end.
        """
        if self.fixed_rows:
            return -(-rows // self.fixed_rows[0]) * self.fixed_rows[0]
        if self.min_rows == 1:
            return rows
        grain = GRAIN_ROWS
        while rows > GRAINS_PER_DOUBLING * grain:
            grain *= 2
        return max(self.min_rows, -(-rows // grain) * grain)


# For the C++ kernels, which sum each row on its own.
AS_IS = PaddingPlan(name="as_is", min_rows=1)

# From the fastest to the safest. On a CPU with matrix instructions (AMX), oneDNN splits a sum
# differently for other row counts. At 64 rows of many inputs it does so for other thread counts.
PADDING_PLANS = (
    PaddingPlan(name="pad_8", min_rows=8),
    PaddingPlan(name="pad_32", min_rows=32),
    PaddingPlan(name="fixed_64", min_rows=64, fixed_rows=(64, 32, 16)),
)
