"""Sections `step` and `transformers`: a decode step as a CUDA graph, and `generate` beside it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.common import (
    DTYPES,
    INNER,
    LAYERS,
    POSITIONS,
    VOCAB,
    C,
    H,
    options_for,
    report,
)
from benchmarks.cuda_step import (
    Decoder,
)


def gpt2(dtype: torch.dtype) -> Any:
    """Return GPT-2 124M with random weights, plain, on the GPU."""
    from gptbatch.pipeline.kv_cache.spec import PADDED
    from gptbatch.pipeline.model.config import GPTConfig
    from gptbatch.pipeline.model.gpt import GPT
    from gptbatch.pipeline.model.linear import Linear

    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=C, n_layer=LAYERS, n_head=H, n_inner=INNER
    )
    model = GPT(config, backend=PADDED).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.02)
    return model.to(device="cuda", dtype=dtype)


def step() -> None:
    """Run the decode step as a graph: logits against the model, bits over batches, tokens/s."""
    found: dict[str, Any] = {}
    prompts = torch.randint(VOCAB, (1024, 32), generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(1024)
    for dtype in ("float32", "bfloat16"):
        model = gpt2(DTYPES[dtype])
        options = options_for(dtype, 64)
        reference = model(prompts[:64].cuda())[:, -1]
        decoder = Decoder(model, 64, 160, options, shuffle=0)
        decoder.start(prompts[:64], 128, seeds[:64])
        decoder.run(1, graph=False)
        got = decoder.decode.logits
        found[f"{dtype} logits against the model"] = (
            (got.float() - reference.float()).norm() / reference.float().norm()
        ).item()
        report(found)
        rings: dict[str, tuple[Tensor, Tensor]] = {}
        order = torch.randperm(1024, generator=torch.Generator().manual_seed(3))
        for label, rows, chunk, graph in (
            ("64 rows", 64, 2048, True),
            ("64 rows, eager, segments in turn, chunks of 256", 64, 256, False),
            ("256 rows", 256, 2048, True),
            ("1024 rows", 1024, 2048, True),
            ("1024 rows shuffled, chunks of 1024", 1024, 1024, True),
        ):
            shuffled = "shuffled" in label
            chosen = order if shuffled else torch.arange(rows)
            options = options_for(dtype, rows, spread="in turn" not in label)
            decoder = Decoder(model, rows, 160, options, shuffle=rows)
            if graph:
                decoder.capture()
            seconds = []
            for repeat in range(3 if graph else 1):
                torch.cuda.synchronize()
                started = time.monotonic()
                decoder.start(prompts[chosen], 128, seeds[chosen], chunk)
                torch.cuda.synchronize()
                prefilled = time.monotonic()
                decoder.run(128, graph=graph)
                torch.cuda.synchronize()
                seconds.append((time.monotonic() - started, time.monotonic() - prefilled))
                del repeat
            total, decode = min(seconds)
            found[f"{dtype} {label}"] = {
                "tokens_per_s": round(rows * 128 / total),
                "decode_tokens_per_s": round(rows * 128 / decode),
                "step_us": round(decode / 128 * 1e6),
            }
            back = torch.argsort(chosen)
            rings[label] = (
                decoder.decode.ring[:, :128].cpu()[back],
                decoder.decode.margins.cpu()[back],
            )
            report(found)
            if graph and not shuffled:
                found[f"{dtype} {label}"]["kernels_us"] = profile(decoder, prompts, seeds)
            report(found)
            del decoder
            torch.cuda.empty_cache()
        expected_tokens, expected_margins = rings["1024 rows"]
        for label, (tokens, margins) in rings.items():
            found[f"{dtype} {label}: equal bits"] = [
                torch.equal(tokens, expected_tokens[: len(tokens)]),
                torch.equal(margins, expected_margins[: len(tokens)]),
                round((tokens == expected_tokens[: len(tokens)]).float().mean().item(), 4),
                int((tokens < 0).sum()),
            ]
        report(found)
        del model
        torch.cuda.empty_cache()


def profile(decoder: Decoder, prompts: Tensor, seeds: Tensor) -> dict[str, float]:
    """Return microseconds of a step by kernel, with half of the tokens generated."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    decoder.start(prompts[: decoder.rows], 128, seeds[: decoder.rows])
    decoder.run(64)
    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        decoder.run(4)
        torch.cuda.synchronize()
    return {
        event.key: round(event.device_time_total / 4, 1)
        for event in profiler.key_averages()
        if event.device_time_total > 0
    }


def transformers_rates() -> None:
    """Measure new tokens/s of transformers: generate, and generate_batch where it runs."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    found: dict[str, Any] = {}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    settings = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 40,
        "max_new_tokens": 128,
        "min_new_tokens": 128,
        "pad_token_id": 0,
    }
    for dtype, rows in (
        ("bfloat16", 64),
        ("float32", 64),
        ("bfloat16", 256),
        ("bfloat16", 1024),
        ("float32", 1024),
    ):
        model = model.to(device="cuda", dtype=DTYPES[dtype])
        idx = torch.randint(VOCAB, (rows, 32), device="cuda")
        try:
            times = []
            for repeat in range(3 if rows == 64 else 2):
                started = time.monotonic()
                with torch.inference_mode():
                    out = model.generate(
                        idx,
                        attention_mask=torch.ones_like(idx),
                        **{**settings, "eos_token_id": None},
                    )
                torch.cuda.synchronize()
                times.append(time.monotonic() - started)
                del repeat
            assert out.shape == (rows, 160)
            found[f"generate {dtype} {rows}"] = round(rows * 128 / min(times))
        except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
            found[f"generate {dtype} {rows}"] = str(error)[:200]
        report(found)
    for dtype, rows in (("bfloat16", 64), ("bfloat16", 1024)):
        try:
            batch = GPT2LMHeadModel(GPT2Config()).eval()
            batch = batch.to(device="cuda", dtype=DTYPES[dtype])
            inputs = torch.randint(VOCAB, (rows, 32)).tolist()
            times = []
            for _ in range(2):
                started = time.monotonic()
                with torch.inference_mode():
                    outputs = batch.generate_batch(
                        inputs=inputs,
                        generation_config=GenerationConfig(eos_token_id=-1, **settings),
                    )
                times.append(time.monotonic() - started)
            new = sum(len(output.generated_tokens) for output in outputs.values())
            found[f"generate_batch {dtype} {rows}"] = [round(new / min(times)), new]
        except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
            found[f"generate_batch {dtype} {rows}"] = f"{type(error).__name__}: {error}"[:300]
        report(found)
