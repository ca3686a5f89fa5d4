"""run_job: one job from config to a complete output folder. The one place that sees data, generation and gpt.

    1. find the checkpoint, read its config.json, open the tokenizer
    2. read all rows once and check them                              (65, 66: nothing has been loaded or written)
    3. look at the output folder: complete already, or another job's? (78)
    4. load the model
    5. rows -> token ids -> engine -> rows of a part -> files
    6. manifest, _SUCCESS

Heavy libraries are imported where they are used: a complete output is recognised without torch.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config import JobConfig
from pipeline.data.checkpoint import Checkpoint, find_checkpoint
from pipeline.data.completions import to_row
from pipeline.data.output_folder import OutputFolder
from pipeline.data.parts import PartWriter
from pipeline.data.prompts import InputSummary, PromptReader, RowDefaults, open_source
from pipeline.data.tokenizer import PromptTokenizer
from pipeline.errors import DeviceError
from pipeline.gpt.config import GPTConfig, parse_config
from pipeline.records import NOISE_VERSION, Completion, Prompt, TokenizedPrompt

if TYPE_CHECKING:
    import torch

    from pipeline.generation.engine import Engine

TOKENIZE_ROWS = 256
# config keys that change tokens, besides the checkpoint and the input
_TOKEN_KEYS = (
    "seed",
    "temperature",
    "top_k",
    "max_new_tokens",
    "ignore_eos",
    "prompt_field",
    "parse_special",
    "context_overflow",
    "window_full",
)


class Progress(Protocol):
    """Who watches a run. Called often: must be quick."""

    def begin(self, total_rows: int) -> None: ...

    def update(self, *, rows: int, errors: int, completion_tokens: int) -> None:
        """All counts are since `begin`."""

    def end(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run did. `skipped` rows were there already; all other counts, times and rates are this run's."""

    output: str
    rows: int
    ok: int
    errors: int
    skipped: int
    prompt_tokens: int
    completion_tokens: int
    load_s: float
    generate_s: float
    wall_s: float
    tokens_per_s: float
    device: str
    dtype: str
    numerics: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InputReport:
    """What a dry run says of an input. Prompt lengths are in tokens; too_long counts prompts above n_positions."""

    rows: int
    prompt_tokens: int
    prompt_tokens_min: int
    prompt_tokens_median: int
    prompt_tokens_max: int
    n_positions: int
    too_long: int
    max_new_tokens: int
    input_digest: str


class Job:
    """A config whose checkpoint, tokenizer and input have been found. Nothing heavy is loaded and nothing written."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.checkpoint: Checkpoint = find_checkpoint(config.model, revision=config.revision, allow_pickle=config.allow_pickle)
        self.gpt_config: GPTConfig = parse_config(self.checkpoint.config, str(self.checkpoint.config_path))
        self.tokenizer = PromptTokenizer(
            self.checkpoint.folder,
            end_of_text=self.gpt_config.end_of_text,
            parse_special=config.parse_special,
            vocab_size=self.gpt_config.vocab_size,
        )
        source = open_source(
            path=config.input,
            dataset=config.dataset,
            dataset_config=config.dataset_config,
            split=config.split,
            dataset_revision=config.dataset_revision,
        )
        self.reader = PromptReader(
            source=source,
            limit=config.limit,
            defaults=RowDefaults(
                prompt_field=config.prompt_field,
                seed=config.seed,
                temperature=config.temperature,
                top_k=config.top_k,
                max_new_tokens=config.max_new_tokens,
            ),
        )

    def identity(self, summary: InputSummary) -> dict[str, Any]:
        """All that makes two runs the same job; `fingerprint` hashes the part of it that changes tokens of a given row."""
        tokens = {
            "model_digest": self.checkpoint.model_digest,
            "tokenizer_digest": self.checkpoint.tokenizer_digest,
            "dtype": self.config.engine.dtype,
            "noise_version": NOISE_VERSION,
        } | {key: getattr(self.config, key) for key in _TOKEN_KEYS}
        fingerprint = hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()
        return {
            "fingerprint": fingerprint,
            **tokens,
            "input_digest": summary.digest,
            "rows": summary.rows,
            "part_rows": self.config.part_rows,
        }

    def tokenized(self, reject: Callable[[Completion], None]) -> Iterator[TokenizedPrompt]:
        """All prompts as the engine takes them; those that it cannot take are given to `reject` as error rows."""
        prompts = self.reader.prompts()
        while batch := list(islice(prompts, TOKENIZE_ROWS)):
            read_s = time.monotonic()
            for prompt, token_ids in zip(batch, self.tokenizer.encode([prompt.text for prompt in batch]), strict=True):
                kept, error = self._fit(prompt, token_ids)
                if error is None:
                    yield TokenizedPrompt(prompt=prompt, token_ids=kept, tokens_dropped=len(token_ids) - len(kept), read_s=read_s)
                else:
                    reject(_error_row(prompt, len(token_ids), error))

    def _fit(self, prompt: Prompt, token_ids: list[int]) -> tuple[list[int], str | None]:
        """The tokens of a prompt that go into the context, or why none do."""
        n_positions = self.gpt_config.n_positions
        if not token_ids:
            return [], "the prompt is empty, and the checkpoint has no end-of-text token to start from"
        if len(token_ids) <= n_positions:
            return token_ids, None
        if self.config.context_overflow == "error":
            return [], f"the prompt has {len(token_ids)} tokens, more than n_positions ({n_positions})"
        return token_ids[-max(1, n_positions - prompt.params.max_new_tokens + 1) :], None


def run_job(config: JobConfig, progress: Progress | None = None) -> RunSummary:
    """Run a job to the end and say what was done. Raises GptbatchError (see errors.py for the kinds)."""
    began = time.monotonic()
    output = OutputFolder(Path(config.output))
    manifest = output.manifest()
    job = Job(config)
    summary = job.reader.check()
    identity = job.identity(summary)
    if manifest is not None and not config.overwrite:
        output.check_identity(manifest, identity)
        if output.is_complete():
            return _nothing_to_do(config, manifest, time.monotonic() - began)
    device = resolve_device(config)
    load_began = time.monotonic()
    engine = _load_engine(job, device)
    load_s = time.monotonic() - load_began
    if manifest is not None and config.overwrite:
        output.clear()
    output.prepare(config.to_yaml(), identity)
    facts = _run_facts(job, device, engine, identity)
    writer = PartWriter(output.path, output.work, part_rows=config.part_rows, total_rows=summary.rows, facts=facts)
    generate_began = time.monotonic()
    counts = _generate(job, engine, writer, progress, summary.rows)
    generate_s = time.monotonic() - generate_began
    output.complete({"identity": identity, **facts, "rows": counts.rows, "errors": counts.errors}, writer.parts)
    return RunSummary(
        output=config.output,
        rows=counts.rows,
        ok=counts.rows - counts.errors,
        errors=counts.errors,
        skipped=0,
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        load_s=round(load_s, 3),
        generate_s=round(generate_s, 3),
        wall_s=round(time.monotonic() - began, 3),
        tokens_per_s=round(counts.completion_tokens / generate_s, 1) if generate_s > 0 else 0.0,
        device=str(device),
        dtype=config.engine.dtype,
        numerics=facts["numerics"],
        fingerprint=identity["fingerprint"],
    )


def inspect_job(config: JobConfig) -> InputReport:
    """A dry run: check every row and count its tokens. Loads no model and writes nothing."""
    job = Job(config)
    summary = job.reader.check()
    lengths = array("q")
    for prompt in job.tokenized(lambda completion: lengths.append(completion.prompt_tokens)):
        lengths.append(len(prompt.token_ids) + prompt.tokens_dropped)
    ordered = sorted(lengths)
    n_positions = job.gpt_config.n_positions
    return InputReport(
        rows=summary.rows,
        prompt_tokens=sum(ordered),
        prompt_tokens_min=ordered[0] if ordered else 0,
        prompt_tokens_median=ordered[len(ordered) // 2] if ordered else 0,
        prompt_tokens_max=ordered[-1] if ordered else 0,
        n_positions=n_positions,
        too_long=sum(length > n_positions for length in ordered),
        max_new_tokens=config.max_new_tokens,
        input_digest=summary.digest,
    )


def resolve_device(config: JobConfig) -> torch.device:
    """The device that the config asks for. Raises DeviceError when this machine does not have it or its dtype."""
    import torch

    wanted = config.engine.device
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise DeviceError("engine.device is cuda, but torch finds no CUDA device here; use cpu or auto", keys=("engine.device",))
    device = torch.device("cuda" if has_cuda and wanted != "cpu" else "cpu")
    if device.type == "cpu" and config.engine.dtype == "float16":
        raise DeviceError(
            "engine.dtype is float16, which CPUs compute slowly and coarsely; use float32 or bfloat16, or a CUDA device",
            keys=("engine.dtype",),
        )
    return device


@dataclass
class _Counts:
    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def _load_engine(job: Job, device: torch.device) -> Engine:
    import torch

    from pipeline.generation.engine import Engine
    from pipeline.gpt.weights import load_gpt

    config = job.config
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    model = load_gpt(job.gpt_config, list(job.checkpoint.weights), dtype=getattr(torch, config.engine.dtype), device=device)
    return Engine(
        model=model,
        batch_size=config.engine.batch_size,
        end_of_text=None if config.ignore_eos else job.gpt_config.end_of_text,
        window_full=config.window_full,
    )


def _generate(job: Job, engine: Engine, writer: PartWriter, progress: Progress | None, total_rows: int) -> _Counts:
    counts = _Counts()

    def write(completion: Completion) -> None:
        text = None if completion.finish_reason == "error" else _completion_text(job, completion)
        writer.add(to_row(completion, text))
        counts.rows += 1
        counts.errors += completion.finish_reason == "error"
        counts.prompt_tokens += completion.prompt_tokens
        counts.completion_tokens += len(completion.token_ids)

    if progress is not None:
        progress.begin(total_rows)
    try:
        for ended in engine.generate(job.tokenized(reject=write)):
            for completion in ended:
                write(completion)
            if progress is not None:
                progress.update(rows=counts.rows, errors=counts.errors, completion_tokens=engine.stats.new_tokens)
    finally:
        if progress is not None:
            progress.end()
    writer.close()
    return counts


def _completion_text(job: Job, completion: Completion) -> str:
    token_ids = completion.token_ids
    return job.tokenizer.decode(token_ids[:-1] if completion.finish_reason == "stop" else token_ids)


def _error_row(prompt: Prompt, prompt_tokens: int, error: str) -> Completion:
    return Completion(
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        prompt_tokens_dropped=0,
        token_ids=[],
        finish_reason="error",
        stop_reason=None,
        error=error,
        timing=None,
    )


def _run_facts(job: Job, device: torch.device, engine: Engine, identity: dict[str, Any]) -> dict[str, Any]:
    """What the manifest and each part's footer say of the run."""
    import torch

    config = job.config
    return {
        "fingerprint": identity["fingerprint"],
        "model": config.model,
        "model_digest": identity["model_digest"],
        "tokenizer_digest": identity["tokenizer_digest"],
        "input": config.input if config.input is not None else f"{config.dataset}[{config.split}]",
        "input_digest": identity["input_digest"],
        "dtype": config.engine.dtype,
        "device": str(device),
        "numerics": "unverified",
        "profile": {
            "attention": "padded",
            "linears": engine.model.linear_kind,
            "torch": torch.__version__,
            "device_class": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "noise_version": NOISE_VERSION,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("gptbatch", "torch", "tokenizers", "datasets", "pyarrow", "numpy")},
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _nothing_to_do(config: JobConfig, manifest: dict[str, Any], wall_s: float) -> RunSummary:
    return RunSummary(
        output=config.output,
        rows=0,
        ok=0,
        errors=0,
        skipped=manifest["rows"],
        prompt_tokens=0,
        completion_tokens=0,
        load_s=0.0,
        generate_s=0.0,
        wall_s=round(wall_s, 3),
        tokens_per_s=0.0,
        device=manifest["device"],
        dtype=manifest["dtype"],
        numerics=manifest["numerics"],
        fingerprint=manifest["fingerprint"],
    )
