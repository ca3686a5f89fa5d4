"""`gptbatch bench`: measures tokens per second, the time per operation, the machine's ceiling."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptbatch.jobs.arguments import FolderArgument, ModelArgument
from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Group
from gptbatch.pipeline.bench.shapes import SHAPES, shape_config
from gptbatch.pipeline.bench.workloads import WORKLOADS, make_workload

if TYPE_CHECKING:
    from gptbatch.pipeline.model.gpt import GPT


@click.group(cls=Group, invoke_without_command=True)
@click.option(
    "--model",
    type=ModelArgument(),
    help="Folder of a checkpoint, or a hub name. Default: random weights of --shape.",
)
@click.option(
    "--shape",
    type=click.Choice(list(SHAPES)),
    default="gpt2",
    show_default=True,
    help="Size of the model with random weights.",
)
@click.option(
    "--workload",
    type=click.Choice(WORKLOADS),
    default="uniform",
    show_default=True,
    help="Prompts to generate from.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type of weights and activations. float16 needs cuda.",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    show_default=True,
    help="Type of the cached keys and values.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Device to compute on. auto: cuda where PyTorch finds a GPU, else cpu.",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "ragged", "padded"]),
    default="auto",
    show_default=True,
    help="Attention backend. auto: ragged where the C++ kernels can be built, else padded.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads. Default: the number that PyTorch finds, at most the CPU quota.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Maximum rows at a time. Default: that of `generate`.",
)
@click.option(
    "--step-tokens",
    type=click.IntRange(1),
    help="Maximum tokens per step. Default: that of `generate`.",
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    default=40,
    show_default=True,
    help="Sample from the k most likely tokens. 0 keeps all tokens.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Measurements of the workload; their median is printed.",
)
@click.option("--no-sharing", is_flag=True, help="Compute a prefix that rows share once per row.")
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> None:
    # \b, the character, keeps click from rewrapping a paragraph; a raw string would lose it
    """Measure new tokens per second on a workload.

    \b
    uniform        64 prompts of 32 tokens, 128 new tokens each
    ragged         256 prompts of 4 to 640 tokens, 8 to 256 new tokens each
    shared_prefix  128 prompts with the same first 384 tokens, 48 new tokens each

    Prints medians over the repeats, the time per operation, and the ceiling of the machine, which
    is measured in the same run. The last line is a JSON object.
    """  # noqa: D301
    context.obj = options
    if context.invoked_subcommand is None:
        _bench(options)


def _bench(options: dict[str, Any]) -> None:
    from gptbatch.pipeline.bench.measure import measure
    from gptbatch.pipeline.engine.engine import SchedulingOptions
    from gptbatch.pipeline.engine.selection import new_engine
    from gptbatch.pipeline.model.padding import STEP_TOKENS

    loaded = _load(options)
    model = loaded.model
    workload = make_workload(
        options["workload"],
        vocab_size=model.config.vocab_size,
        n_positions=model.config.n_positions,
    )
    engine = new_engine(
        model,
        batch_size=loaded.batch_size(options["batch_size"]),
        eos_token_ids=(),
        memory_bytes=loaded.cache_memory_bytes(None),
        scheduling=SchedulingOptions(
            step_tokens=options["step_tokens"] or STEP_TOKENS,
            share_prefixes=not options["no_sharing"],
        ),
    )
    found = measure(
        engine, workload, repeats=options["repeats"], top_k=options["top_k"], report=echo
    )
    rates = found.ceiling_rates
    echo(f"new tokens      {found.tokens_per_s:8.0f} tokens/s (median)")
    echo(
        f"prompt tokens   {found.prompt_tokens_per_s:8.0f} tokens/s, "
        f"{found.prefix_share:.1%} from the prefix cache"
    )
    echo(f"tokens per step {found.tokens_per_step:8.0f}, {found.padding_share:.1%} padding")
    echo(
        f"ceiling         {found.ceiling_tokens_per_s:8.0f} tokens/s, "
        f"of which {found.ceiling_share:.0%} are reached"
    )
    head = (
        ""
        if rates.head_gflops == rates.gemm_gflops
        else f", {rates.head_gflops:.0f} for the LM head"
    )
    echo(
        f"                ({rates.gemm_gflops:.0f} GFLOP/s of matrix products{head}, "
        f"{rates.read_gb_per_s:.0f} GB/s of memory)"
    )
    echo("seconds of one repeat, with torch.profiler:")
    for operation, seconds in found.seconds_by_operation.items():
        echo(f"  {operation:<12} {seconds:8.2f}")
    summary = {
        **_described(options, model),
        "batch_invariance": loaded.batch_invariance,
        "workload": options["workload"],
        "top_k": options["top_k"],
        "batch_size": engine.batch_size,
        "step_tokens": engine.scheduling.step_tokens,
        "share_prefixes": engine.scheduling.share_prefixes,
        **_rounded(asdict(found)),
    }
    echo(json.dumps(summary))


@bench.command()
@click.option(
    "--output",
    type=FolderArgument(),
    default=Path(),
    help="Folder for scaling.png and scaling.json. Default: the current folder.",
)
@click.option(
    "--points",
    type=click.IntRange(4),
    default=40,
    show_default=True,
    help="Number of steps at which the naive loop is measured.",
)
@click.pass_obj
def scaling(options: dict[str, Any], output: Path, points: int) -> None:
    """Measure the time of one more token as the context grows to beyond n_positions.

    Compares the naive loop, the engine, and window_full: slide, for one row with temperature 0.8
    and top-k 40. Writes scaling.png, with linear and quadratic fits, and scaling.json. Give the
    options of the model before `scaling`.
    """
    from gptbatch.pipeline.bench.chart import (
        check_matplotlib,
        describe_measurement,
        draw_scaling,
    )
    from gptbatch.pipeline.bench.scaling import measure_scaling

    check_matplotlib()
    output.mkdir(parents=True, exist_ok=True)
    model = _load(options).model
    curves = measure_scaling(model, points=points)
    described = _described(options, model)
    cache = "" if described["cache_dtype"] == "auto" else f", {described['cache_dtype']} cache"
    measured = describe_measurement(
        described, described["model"], f"{described['dtype']}{cache}", "one sequence"
    )
    draw_scaling(
        curves, output / "scaling.png", n_positions=model.config.n_positions, measured=measured
    )
    (output / "scaling.json").write_text(
        json.dumps({**described, "curves": [asdict(curve) for curve in curves]}) + "\n",
        encoding="utf-8",
    )
    ends = {}
    for curve in curves:
        first, last = (
            _at(curve.steps, curve.seconds, model.config.n_positions * share // 10)
            for share in (1, 9)
        )
        ends[curve.name] = round(last / first, 2)
        echo(
            f"{curve.name:<7} {first * 1e3:8.2f} ms at a tenth of the context, "
            f"{last * 1e3:8.2f} ms at nine tenths"
        )
    echo(
        json.dumps(
            {
                **described,
                "growth_from_a_tenth_to_nine_tenths": ends,
                "picture": str(output / "scaling.png"),
            }
        )
    )


def _at(steps: list[int], seconds: list[float], step: int) -> float:
    """Return the median of the five steps nearest to this one."""
    nearest = sorted(range(len(steps)), key=lambda i: abs(steps[i] - step))[:5]
    return statistics.median(seconds[i] for i in nearest)


def _load(options: dict[str, Any]) -> Any:
    """Load the model of the options, or one with random weights, as `generate` does."""
    import torch

    from gptbatch.pipeline.bench.random_model import random_model
    from gptbatch.pipeline.config import EngineConfig
    from gptbatch.pipeline.model.checkpoint import find_checkpoint
    from gptbatch.pipeline.model.config import parse_config
    from gptbatch.pipeline.model.loading import load_model, prepare_model, resolve_device

    engine = EngineConfig(
        **{key: options[key] for key in ("device", "dtype", "cache_dtype", "attention", "threads")}
    )
    device = resolve_device(engine)
    if options["model"] is None:
        return prepare_model(
            engine,
            device,
            lambda backend: random_model(
                shape_config(options["shape"]),
                dtype=getattr(torch, engine.dtype),
                device=device,
                backend=backend,
                cache_dtype=engine.cache_dtype,
            ),
            batch_invariance="auto",
        )
    checkpoint = find_checkpoint(options["model"], revision=None, allow_pickle=False)
    config = parse_config(checkpoint.config, str(checkpoint.config_path))
    return load_model(checkpoint, config, engine, device, batch_invariance="auto")


def _described(options: dict[str, Any], model: GPT) -> dict[str, Any]:
    from gptbatch.pipeline.bench.machine import describe_machine

    return {
        "model": options["model"] or f"{options['shape']} with random weights",
        "dtype": options["dtype"],
        "cache_dtype": options["cache_dtype"],
        "attention": model.backend.name,
        "linears": model.linear_kind,
        **describe_machine(model.device),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
