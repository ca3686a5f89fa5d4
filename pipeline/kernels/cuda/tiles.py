"""How linears are cut into tiles: a table by dtype, rows and shape. It changes no bit.

No autotuning: a table from `make cuda-check` gives the same speed at every start. Imports no
triton.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace

import torch

# The head writes one maximum per this many columns; its tiles are as wide.
MAX_COLUMNS = 128
MIN_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """How a linear is cut.

    Attributes:
        bm: Rows per program.
        bn: Columns per program.
        bk: Step of K.
        warps: Warps per program.
        stages: Depth of the software pipeline.
    """

    bm: int
    bn: int
    bk: int
    warps: int = 4
    stages: int = 4

    @property
    def options(self) -> dict[str, int | bool]:
        """Return the keyword arguments of a launch."""
        return {
            "BM": self.bm,
            "BN": self.bn,
            "BK": self.bk,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


# (most rows, tile of wide linears, tile of others, tile of the head). Wide: at least 2 K columns.
# A tile of 16-bit numbers has at least 64 rows, so that all run on the same instruction.
_HALF = (
    (64, Tile(64, 32, 128, 4, 4), Tile(64, 16, 128, 4, 4), Tile(64, 128, 64, 4, 4)),
    (256, Tile(64, 64, 64, 4, 4), Tile(64, 32, 128, 4, 4), Tile(64, 128, 64, 4, 4)),
    (2**31, Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 3)),
)
_FLOAT = (
    (16, Tile(16, 64, 16, 4, 3), Tile(16, 32, 32, 4, 3), Tile(16, 128, 16, 4, 3)),
    (64, Tile(32, 64, 16, 4, 3), Tile(32, 32, 32, 4, 3), Tile(64, 128, 16, 8, 3)),
    (256, Tile(64, 64, 16, 4, 3), Tile(32, 64, 16, 4, 3), Tile(64, 128, 16, 8, 3)),
    (2**31, Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3), Tile(128, 128, 16, 8, 3)),
)
TABLES = {torch.float32: _FLOAT, torch.bfloat16: _HALF, torch.float16: _HALF}


def tile_for(
    dtype: torch.dtype, rows: int, columns: int, depth: int, *, has_max: bool = False
) -> Tile:
    """Return the tile of a linear (rows, depth) -> (rows, columns)."""
    group = next(group for group in TABLES[dtype] if rows <= group[0])
    tile = group[3] if has_max else group[1] if columns >= 2 * depth else group[2]
    # Small models: no step beyond K.
    step = max(MIN_DEPTH, 1 << (depth - 1).bit_length())
    return tile if step >= tile.bk else replace(tile, bk=step)


def table_hash() -> str:
    """Return a hash of the table, for the environment."""
    text = repr(
        [[asdict(tile) for _, *tiles in table for tile in tiles] for table in (_HALF, _FLOAT)]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
