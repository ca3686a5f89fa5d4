"""The network: GPT-2 (Radford et al. 2019), written out.

Token and position embeddings are summed, then come L pre-norm blocks of masked self-attention and an MLP, a final norm and
a linear head. All layers work on flat tokens: a token is a row of (N, C), whichever sequence it belongs to; only attention
knows sequences.

Knows: tokens, seq_indices and positions. Does not know: prompts, text, sampling.
Shapes: N tokens of a call, B sequences or seq_indices, T tokens of a sequence, C n_embd, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from gptbatch.pipeline.kv_cache.block_pool import blocks_for
from gptbatch.pipeline.kv_cache.interface import Backend, KVCache, max_seqs_for, new_cache
from gptbatch.pipeline.kv_cache.padded import ReductionOrder
from gptbatch.pipeline.kv_cache.quantization import BLOCK_SIZES, CacheDtype, bytes_a_token
from gptbatch.pipeline.model.blocks import Block, BlockStack
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.linear import AS_IS, PADDING_PLANS, Linear, LinearKind, PaddingPlan
from gptbatch.pipeline.model.lm_head import HEAD, HEAD_ROWS, TwoPassHead, make_two_pass_head
from gptbatch.pipeline.model.norm import Norm


class GPT(nn.Module):
    """The whole network. The head is a layer of its own, which may share the token embedding's weight (tied).

    attention: the backend that its caches are made for. cache_dtype: what these keep. reduction_order: how padded attention computes. padding_plan:
    at how many rows its linears run (see `use_padding_plan`).
    """

    def __init__(self, config: GPTConfig, *, attention: Backend = "padded") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.cache_dtype: CacheDtype = "auto"
        self.reduction_order: ReductionOrder = "matmul"
        self.padding_plan = PADDING_PLANS[0]
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = BlockStack(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, config.layer_norm_epsilon)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.tie(self.wte)
        self.two_pass_head: TwoPassHead | None = None

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
            seq_indices=[seq_index for seq_index in range(batch) for _ in range(length)],
            positions=[*range(length)] * batch,
        )
        return logits.view(batch, length, -1)

    def new_cache(self, max_seqs: int, *, capacity: int | None = None) -> KVCache:
        """An empty cache for this network's sequences. capacity: see attention.new_cache."""
        return new_cache(
            self.attention,
            self.config,
            max_seqs=max_seqs,
            capacity=capacity,
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
            reduction_order=self.reduction_order,
            device=self.device,
        )

    def capacity_of(self, lengths: Iterable[int]) -> int:
        """The capacity of a cache that has room for sequences of so many positions."""
        size = BLOCK_SIZES[self.cache_dtype]
        return sum(blocks_for(length, size) * size for length in lengths)

    def max_seqs_for(self, capacity: int | None) -> int | None:
        """See attention.max_seqs_for."""
        return max_seqs_for(self.attention, self.config, capacity=capacity)

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
        seq_indices: Sequence[int],
        positions: Sequence[int],
        logits_indices: Sequence[int] | None = None,
    ) -> Tensor:
        """Run N new tokens through the network -> logits (S, V) that follow the S tokens `logits_indices`; see `hidden`."""
        return self.logits(
            self.hidden(
                cache,
                tokens=tokens,
                seq_indices=seq_indices,
                positions=positions,
                logits_indices=logits_indices,
            )
        )

    def hidden(
        self,
        cache: KVCache,
        *,
        tokens: Sequence[int],
        seq_indices: Sequence[int],
        positions: Sequence[int],
        logits_indices: Sequence[int] | None = None,
    ) -> Tensor:
        """Run N new tokens through the blocks -> what the head sees (S, C) of the S tokens `logits_indices` (indices; None wants all N).

        Token i goes to position positions[i] of seq_index seq_indices[i]; the tokens of a seq_index stand in order, and all before them must
        be in the cache. Prefill, a chunk of it and decode are this same call, and tokens of many seq_indices can share it.
        """
        attention = cache.step(seq_indices, positions)
        x = self.wte(self._padded(tokens)) + self.wpe(self._padded(positions))
        everything = range(len(tokens))
        logits_indices = everything if logits_indices is None else logits_indices
        x = self.blocks(
            x,
            attention,
            None if [*logits_indices] == [*everything] else self._padded(logits_indices),
        )
        return self.ln_f(x[: len(logits_indices)])  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (S, C) -> logits (S, V)."""
        pieces = [self._head(piece) for piece in hidden.split(HEAD_ROWS)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _head(self, hidden: Tensor) -> Tensor:
        rows = len(hidden)
        if rows == 0:
            return hidden.new_empty(0, self.config.vocab_size)
        with record_function(HEAD):
            logits: Tensor = self.lm_head(
                F.pad(hidden, (0, 0, 0, self.padding_plan.rows(rows) - rows))
            )
        return logits[:rows]

    def _padded(self, values: Sequence[int]) -> Tensor:
        """(N,) -> (N or more,): as many as the linears run at, and at least 1; zeros fill up."""
        padding = self.padding_plan.rows(max(1, len(values))) - len(values)
        return torch.tensor([*values, *[0] * padding], device=self.device)

    def use_padding_plan(self, plan: PaddingPlan) -> None:
        """Run the linears at the row counts of this plan; where they are constant, all at the largest (see `use_fixed_rows`)."""
        self.padding_plan = plan
        for module in self.modules():
            if isinstance(module, Linear):
                module.fixed_rows = plan.constant[0] if plan.constant else None
        self.blocks.gather()

    def use_fixed_rows(self, name: str, rows: int) -> None:
        """Run the linears of this name ("mlp_out", in every block) at so many rows at a time, one of the plan's constants."""
        assert rows in self.padding_plan.constant
        for path, module in self.named_modules():
            if isinstance(module, Linear) and path.rpartition(".")[2] == name:
                module.fixed_rows = rows

    @property
    def padding_plan_name(self) -> str:
        """The row plan in words, the linears named that do not run at its first constant: "fixed_64, mlp_out 32"."""
        first, *_ = self.padding_plan.constant or (None,)
        others = {
            f"{path.rpartition('.')[2]} {module.fixed_rows}": None
            for path, module in self.named_modules()
            if isinstance(module, Linear) and module.fixed_rows != first
        }
        return ", ".join([self.padding_plan.name, *others])

    def pack(self) -> None:
        """Lay the linears out for this CPU (see Linear.pack) and use our kernels; the network can no longer be copied into or moved."""
        tied = self.lm_head.weight is self.wte.weight
        for module in self.modules():
            if isinstance(module, (Linear, Norm)):
                module.pack(native=self.native)
        self.two_pass_head = make_two_pass_head(self.lm_head, self.wte.weight) if tied else None
        self.use_padding_plan(self.padding_plans[0])

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
    def reduction_orders(self) -> tuple[ReductionOrder, ...]:
        """How its attention may compute, from the fastest to the surest."""
        return ("matmul", "pairwise") if self.attention == "padded" else ("matmul",)

    @property
    def padding_plans(self) -> tuple[PaddingPlan, ...]:
        """At which row counts its linears may run, from the fastest to the surest."""
        ours = self.linear_kind in ("native", "native_float32")
        return (AS_IS, *PADDING_PLANS) if ours else PADDING_PLANS

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
