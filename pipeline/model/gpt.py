"""The network: GPT-2 (Radford et al. 2019), written out.

Token and position embeddings are summed, then come L pre-norm blocks of masked self-attention and an MLP, a final norm and
a linear head. All layers work on flat tokens: a token is a row of (N, C), whichever sequence it belongs to; only attention
knows sequences.

Knows: tokens, slots and positions. Does not know: prompts, text, sampling.
Shapes: N tokens of a call, B sequences or slots, T tokens of a sequence, C n_embd, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from gptbatch.pipeline.kv_cache.block_pool import n_pages_of
from gptbatch.pipeline.kv_cache.interface import Backend, KVCache, most_slots, new_cache
from gptbatch.pipeline.kv_cache.padded import Products
from gptbatch.pipeline.kv_cache.quantization import PAGE_SIZES, CacheDtype, bytes_a_token
from gptbatch.pipeline.model.blocks import Block, Blocks
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.linear import AS_THEY_COME, ROW_PLANS, Linear, LinearKind, RowPlan
from gptbatch.pipeline.model.lm_head import HEAD, HEAD_ROWS, Screen, new_screen
from gptbatch.pipeline.model.norm import Norm


class GPT(nn.Module):
    """The whole network. The head is a layer of its own, which may share the token embedding's weight (tied).

    attention: the backend that its caches are made for. cache_dtype: what these keep. products: how padded attention computes. row_plan:
    at how many rows its linears run (see `use_rows`).
    """

    def __init__(self, config: GPTConfig, *, attention: Backend = "padded") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.cache_dtype: CacheDtype = "auto"
        self.products: Products = "matmul"
        self.row_plan = ROW_PLANS[0]
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = Blocks(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, config.layer_norm_epsilon)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.tie(self.wte)
        self.screen: Screen | None = None

    def forward(self, idx: Tensor) -> Tensor:
        """The plain network: idx (B, T) -> logits (B, T, V), every position over its whole context, nothing cached before.

        Raises ValueError when T is 0 or above n_positions.
        """
        batch, length = idx.shape
        if not 1 <= length <= self.config.n_positions:
            raise ValueError(
                f"a sequence of {length} tokens does not fit: 1 to n_positions ({self.config.n_positions}) do"
            )
        logits = self.extend(
            self.new_cache(batch, capacity=self.capacity_of([length] * batch)),
            tokens=idx.flatten().tolist(),
            slots=[slot for slot in range(batch) for _ in range(length)],
            positions=[*range(length)] * batch,
        )
        return logits.view(batch, length, -1)

    def new_cache(self, n_slots: int, *, capacity: int | None = None) -> KVCache:
        """An empty cache for this network's sequences. capacity: see attention.new_cache."""
        return new_cache(
            self.attention,
            self.config,
            n_slots=n_slots,
            capacity=capacity,
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
            products=self.products,
            device=self.device,
        )

    def capacity_of(self, lengths: Iterable[int]) -> int:
        """The capacity of a cache that has room for sequences of so many positions."""
        size = PAGE_SIZES[self.cache_dtype]
        return sum(n_pages_of(length, size) * size for length in lengths)

    def most_slots(self, capacity: int | None) -> int | None:
        """See attention.most_slots."""
        return most_slots(self.attention, self.config, capacity=capacity)

    @property
    def cache_bytes_a_token(self) -> int:
        """Memory that a position of one sequence takes in the cache."""
        return bytes_a_token(
            self.config, self.dtype, self.cache_dtype if self.attention == "ragged" else "auto"
        )

    def extend(
        self,
        cache: KVCache,
        *,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Run N new tokens through the network -> logits (S, V) that follow the S tokens `wanted`; see `hidden`."""
        return self.logits(
            self.hidden(cache, tokens=tokens, slots=slots, positions=positions, wanted=wanted)
        )

    def hidden(
        self,
        cache: KVCache,
        *,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Run N new tokens through the blocks -> what the head sees (S, C) of the S tokens `wanted` (indices; None wants all N).

        Token i goes to position positions[i] of slot slots[i]; the tokens of a slot stand in order, and all before them must
        be in the cache. Prefill, a chunk of it and decode are this same call, and tokens of many slots can share it.
        """
        attention = cache.step(slots, positions)
        x = self.wte(self._padded(tokens)) + self.wpe(self._padded(positions))
        everything = range(len(tokens))
        wanted = everything if wanted is None else wanted
        x = self.blocks(x, attention, None if [*wanted] == [*everything] else self._padded(wanted))
        return self.ln_f(x[: len(wanted)])  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (S, C) -> logits (S, V)."""
        pieces = [self._head(piece) for piece in hidden.split(HEAD_ROWS)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _head(self, hidden: Tensor) -> Tensor:
        rows = len(hidden)
        if rows == 0:
            return hidden.new_empty(0, self.config.vocab_size)
        with record_function(HEAD):
            logits: Tensor = self.lm_head(F.pad(hidden, (0, 0, 0, self.row_plan.rows(rows) - rows)))
        return logits[:rows]

    def _padded(self, values: Sequence[int]) -> Tensor:
        """(N,) -> (N or more,): as many as the linears run at, and at least 1; zeros fill up."""
        padding = self.row_plan.rows(max(1, len(values))) - len(values)
        return torch.tensor([*values, *[0] * padding], device=self.device)

    def use_rows(self, plan: RowPlan) -> None:
        """Run the linears at the row counts of this plan; where they are constant, all at the largest (see `use_constant_rows`)."""
        self.row_plan = plan
        for module in self.modules():
            if isinstance(module, Linear):
                module.constant_rows = plan.constant[0] if plan.constant else None
        self.blocks.gather()

    def use_constant_rows(self, name: str, rows: int) -> None:
        """Run the linears of this name ("mlp_out", in every block) at so many rows at a time, one of the plan's constants."""
        assert rows in self.row_plan.constant
        for path, module in self.named_modules():
            if isinstance(module, Linear) and path.rpartition(".")[2] == name:
                module.constant_rows = rows

    @property
    def row_plan_name(self) -> str:
        """The row plan in words, the linears named that do not run at its first constant: "constant, mlp_out 32"."""
        first, *_ = self.row_plan.constant or (None,)
        others = {
            f"{path.rpartition('.')[2]} {module.constant_rows}": None
            for path, module in self.named_modules()
            if isinstance(module, Linear) and module.constant_rows != first
        }
        return ", ".join([self.row_plan.name, *others])

    def pack(self) -> None:
        """Lay the linears out for this CPU (see Linear.pack) and use our kernels; the network can no longer be copied into or moved."""
        tied = self.lm_head.weight is self.wte.weight
        for module in self.modules():
            if isinstance(module, (Linear, Norm)):
                module.pack(native=self.native)
        self.screen = new_screen(self.lm_head, self.wte.weight) if tied else None
        self.use_rows(self.row_plans[0])

    def parameter_count(self) -> int:
        """Parameters with the head counted as its own, as transformers counts an untied model. Before `pack` only."""
        return sum(
            parameter.numel() for _, parameter in self.named_parameters(remove_duplicate=False)
        )

    @property
    def native(self) -> bool:
        """Whether our C++ kernels do what they can do: where attention is ragged. Elsewhere all is torch's."""
        return self.attention == "ragged"

    @property
    def products_to_try(self) -> tuple[Products, ...]:
        """How its attention may compute, from the fastest to the surest."""
        return ("matmul", "pairwise") if self.attention == "padded" else ("matmul",)

    @property
    def row_plans(self) -> tuple[RowPlan, ...]:
        """At which row counts its linears may run, from the fastest to the surest."""
        ours = self.linear_kind in ("native", "native_float32")
        return (AS_THEY_COME, *ROW_PLANS) if ours else ROW_PLANS

    @property
    def linear_kind(self) -> LinearKind:
        """How the linears are laid out (see Linear.pack)."""
        return self.lm_head.kind

    @property
    def dtype(self) -> torch.dtype:
        return self.wpe.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.wpe.weight.device
