"""Generation in memory: prompts in, a table out, with a model that is kept for the next call.

    table = gptbatch.generate(["KING:", {"prompt": "QUEEN:", "seed": 3}], model="gpt2", top_k=40)

The rows are those that a job of the same settings writes, bit for bit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptbatch.jobs.progress import progress_for_python
from gptbatch.pipeline.config.call import CALL_SETTINGS, LOADING_SETTINGS, CallConfig, call_config
from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.input.config_hash import job_identity
from gptbatch.pipeline.input.open_input import open_input
from gptbatch.pipeline.input.prompt_list import Prompts, prompt_source
from gptbatch.pipeline.input.tokenize import TokenizedInput, log_generation_warnings
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.loading import LoadedModel, load_model, resolve_device
from gptbatch.pipeline.output.error_rows import describe_errors
from gptbatch.pipeline.output.in_memory import generate_table, with_facts
from gptbatch.pipeline.output.row_runner import Progress
from gptbatch.pipeline.output.run_facts import collect_run_facts, public_facts
from gptbatch.pipeline.system.bundled import locate

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("gptbatch")

# One call computes at a time: the number of threads belongs to the process.
_computing = threading.RLock()
_kept: LLM | None = None


class LLM:
    """A GPT-2 checkpoint that generates tables of completions.

    The files are found at once. The weights are loaded by the first call of `generate`, after its
    prompts and settings are checked, and stay loaded.

    Args:
        model: Folder of a checkpoint, or a model name on the Hugging Face hub.
        settings: revision, allow_pickle, batch_invariance, device, dtype, cache_dtype, threads and
            attention, as in `JobConfig` and `EngineConfig`.

    Raises:
        ConfigError: A setting is wrong, or the checkpoint cannot be used.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        _refuse("LLM", settings, CALL_SETTINGS, "belongs to a call; give it to generate")
        self._settings = {"model": model, **settings}
        self._config = call_config("LLM", self._settings)
        found = find_checkpoint(
            self._config.model,
            revision=self._config.revision,
            allow_pickle=self._config.allow_pickle,
        )
        # A later change of the current folder has no effect.
        self._checkpoint = replace(
            found,
            folder=found.folder.absolute(),
            weights=tuple(path.absolute() for path in found.weights),
        )
        config_path = str(self._checkpoint.config_path)
        self._gpt_config = parse_config(self._checkpoint.config, config_path)
        self._tokenizer = load_tokenizer(self._checkpoint.folder)
        self._place = _place(self._config.model)
        self._files = _states_of_files(self._checkpoint.folder)
        self._loaded: LoadedModel | None = None
        self._threads = 0
        log_generation_warnings(self._checkpoint)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        return f"LLM({settings})"

    def generate(
        self,
        prompts: Prompts,
        *,
        progress: Progress | bool | None = None,
        **settings: Any,
    ) -> pa.Table:
        """Generate a row for every sample of every prompt, in the order of the prompts.

        Args:
            prompts: Texts, dictionaries with the fields of a row, or a table with a row per prompt.
                Fields are those of an input row: prompt, id, settings, metadata.
            progress: True shows a bar, False none, None one in notebooks and on terminals. Or an
                object that takes the counts.
            settings: The settings of rows without their own: temperature, seed, n and the others
                of `JobConfig`, but those of files and of loading. batch_size and memory_gib, too.

        Returns:
            The table that a job writes, with all of its columns. A row that cannot run has its
            reason in the column `error`.

        Raises:
            ConfigError: A setting is wrong, or the model cannot follow it.
            InputRowsError: Rows are invalid, and `on_bad_row` is "fail".
            OutOfMemoryError: Memory does not suffice for one row.
        """
        _refuse("generate", settings, LOADING_SETTINGS, "belongs to the model; give it to LLM")
        return self._generate(
            prompts, call_config("generate", {**self._settings, **settings}), progress
        )

    def _generate(
        self, prompts: Prompts, config: CallConfig, progress: Progress | bool | None
    ) -> pa.Table:
        if not (progress is None or isinstance(progress, bool) or hasattr(progress, "begin")):
            raise ConfigError(
                "progress must be True, False, None, or an object with the methods begin, update "
                f"and end, not {progress!r}"
            )
        reader = open_input(config, prompt_source(prompts, config))
        tokenized = TokenizedInput(config, self._checkpoint, self._tokenizer, reader)
        summary = reader.check()
        with _computing, self._own_threads():
            loaded = self._load()
            if isinstance(progress, bool) or progress is None:
                progress = progress_for_python(progress)
            result = generate_table(config, tokenized, summary, loaded, progress)
        if described := describe_errors(result.error_kinds, summary.rows):
            logger.warning("%s; the column error has the reasons", described)
        identity = {
            **job_identity(config, self._checkpoint, self._tokenizer),
            "input_digest": summary.digest,
        }
        facts = collect_run_facts(config, identity, self._checkpoint, loaded)
        return with_facts(result.table, public_facts(facts))

    def _load(self) -> LoadedModel:
        """Return the model, loaded by the first call."""
        import torch

        if self._loaded is None:
            engine = self._config.engine
            self._loaded = load_model(
                self._checkpoint,
                self._gpt_config,
                engine,
                resolve_device(engine),
                batch_invariance=self._config.batch_invariance,
            )
            self._threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        return self._loaded

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        """Leave the caller's number of threads as it was."""
        import torch

        threads = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _serves(self, config: CallConfig) -> bool:
        """Return whether a call with these settings can use this model, as its files are now."""
        mine = self._config
        names = [name for name in LOADING_SETTINGS if name != "model"]
        return (
            all(_value(config, name) == _value(mine, name) for name in names)
            and _place(config.model) == self._place
            and _states_of_files(self._checkpoint.folder) == self._files
        )


def generate(
    prompts: Prompts,
    *,
    model: str,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> pa.Table:
    """Generate a row for every sample of every prompt; see `LLM.generate`.

    The model is kept for the next call with the same settings of loading. `unload` frees it, and so
    does a call with another model. Several models at once take an `LLM` each.

    Args:
        prompts: Texts, dictionaries with the fields of a row, or a table with a row per prompt.
        model: Folder of a checkpoint, or a model name on the Hugging Face hub.
        progress: See `LLM.generate`.
        settings: Those of `LLM` and of `LLM.generate`.

    Raises:
        ConfigError: A setting is wrong, or the checkpoint cannot be used.
        InputRowsError: Rows are invalid, and `on_bad_row` is "fail".
        OutOfMemoryError: Memory does not suffice for one row.
    """
    global _kept
    config = call_config("generate", {"model": model, **settings})
    with _computing:
        if _kept is None or not _kept._serves(config):
            loading = {name: settings[name] for name in LOADING_SETTINGS if name in settings}
            _kept = LLM(model, **loading)
        return _kept._generate(prompts, config, progress)


def unload() -> None:
    """Free the model that `generate` keeps."""
    global _kept
    with _computing:
        _kept = None


def _refuse(where: str, settings: dict[str, Any], names: Iterable[str], instead: str) -> None:
    """Raise ConfigError if one of these settings is given."""
    for name in names:
        if name in settings:
            raise ConfigError(f"{where}: {name}: {instead}", keys=(name,))


def _value(config: CallConfig, name: str) -> Any:
    return getattr(config, name) if hasattr(config, name) else getattr(config.engine, name)


def _place(model: str) -> str:
    """Return the absolute path of a folder, or a name on the hub."""
    path = locate(model)
    return str(path.absolute()) if path.exists() else model


def _states_of_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and the time of each file of a checkpoint, by name."""
    if not folder.is_dir():
        return {}
    states = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}
