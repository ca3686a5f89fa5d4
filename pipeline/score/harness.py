"""The model `gptbatch` of EleutherAI's lm-evaluation-harness (the extra `gptbatch[lm-eval]`).

    from gptbatch.lm_eval import GptbatchLM

    lm_eval.simple_evaluate(model=GptbatchLM(model="gpt2"), tasks=["lambada_openai"])

Scores and completions of a request do not depend on batch size, order or other requests. Texts are
encoded by the rules of `HFLM`, the harness's adapter of transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.input.config_hash import start_token
from gptbatch.pipeline.input.rows import derive_seed
from gptbatch.pipeline.input.tokenize import token_bytes_of_model
from gptbatch.pipeline.input.tokenizer import PromptTokenizer
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.loading import LoadedModel, load_model, resolve_device
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS, text_problem
from gptbatch.pipeline.score.pairs import EncodedPair, PairEncoder, fit
from gptbatch.pipeline.score.scoring import TokenPair, score_windows
from gptbatch.pipeline.types import Prompt, TokenizedPrompt

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Requests that are sorted together.
WINDOW_PAIRS = 2048
# Names of the limit of new tokens, by precedence.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings of a request that have the name and meaning of gptbatch's.
_SAMPLING = (
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
)

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class GptbatchLM(TemplateLM):  # type: ignore[misc]
    """A GPT-2 checkpoint, computed by gptbatch.

    Args:
        model: A folder or a name on the hub.
        pretrained: Another name of `model`, that of HFLM.
        revision: Branch, tag or commit on the hub.
        allow_pickle: Read pytorch_model.bin where the checkpoint has no safetensors.
        device: "cpu", "cuda", or None for a GPU if there is one.
        dtype: "float32", "bfloat16" or "float16".
        cache_dtype: "auto" or "int8".
        attention: "auto", "ragged" or "padded".
        threads: CPU threads.
        batch_invariance: "auto", "require", "portable" or "off": the self-test.
        parse_special: Read the text of a special token as that token, as HFLM does.
        add_special_tokens: Add the tokens of the tokenizer's template, as HFLM does.
        max_gen_toks: New tokens of a request that names no limit.
        seed: Run seed of requests that sample.
        batch_size: Not used: results do not depend on it, and gptbatch fills its batches by itself.
        max_batch_size: Not used.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        pretrained: str | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        cache_dtype: str = "auto",
        attention: str = "auto",
        threads: int | None = None,
        batch_invariance: str = "auto",
        parse_special: bool = True,
        add_special_tokens: bool = True,
        max_gen_toks: int = 256,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        name = model or pretrained
        if name is None:
            raise ConfigError("model is required: a folder or a name on the hub", keys=("model",))
        if batch_invariance not in ("auto", "require", "portable", "off"):
            raise ConfigError(
                f"batch_invariance must be auto, require, portable or off: {batch_invariance}"
            )
        engine = EngineConfig.model_validate(
            {
                "device": (device or "auto").partition(":")[0],
                "dtype": dtype,
                "cache_dtype": cache_dtype,
                "attention": attention,
                "threads": threads,
            }
        )
        checkpoint = find_checkpoint(name, revision=revision, allow_pickle=allow_pickle)
        self.gpt_config = parse_config(checkpoint.config, str(checkpoint.config_path))
        tokenizer = load_tokenizer(checkpoint.folder)
        special_tokens = checkpoint.special_tokens
        self._checkpoint, self._revision = checkpoint, revision
        self._eos_token_ids = special_tokens.eos_token_ids
        self._start_token = start_token(special_tokens, tokenizer)
        self._encoder = PairEncoder(
            tokenizer,
            start_token=self._start_token,
            parse_special=parse_special,
            add_special_tokens=add_special_tokens,
            on_lost_text="warn",
        )
        # decodes completions
        self._decoder = PromptTokenizer(
            tokenizer,
            start_token=self._start_token,
            parse_special=parse_special,
            add_special_tokens=add_special_tokens,
        )
        # empty unless tokens are bytes of text
        self._token_bytes = token_bytes_of_model(self._decoder, self.gpt_config)
        self._max_gen_toks, self._seed, self._dtype = max_gen_toks, seed, dtype
        self.loaded: LoadedModel = load_model(
            checkpoint,
            self.gpt_config,
            engine,
            resolve_device(engine),
            batch_invariance=batch_invariance,  # type: ignore[arg-type]
        )
        self._device = self.loaded.model.device

    @property
    def eot_token_id(self) -> int:
        """The first EOS token."""
        if not self._eos_token_ids:
            raise ConfigError(f"{self._checkpoint.name}: the checkpoint names no EOS token")
        return self._eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one."""
        return self.eot_token_id if self._start_token is None else self._start_token

    @property
    def max_length(self) -> int:
        """The context length in tokens."""
        return self.gpt_config.n_positions

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a request that names no limit."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """The checkpoint, for the harness's cache of requests."""
        return str(self._checkpoint.name).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return facts of the model for the harness's results."""
        return {
            "model_dtype": self._dtype,
            "model_revision": self._revision,
            "model_sha": self._checkpoint.model_digest,
            "batch_invariance": self.loaded.batch_invariance,
            "environment": self.loaded.environment,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text. By default the template is left out of a text that begins with `<s>`."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._decoder.decode([self.prefix_token_id]))
        (encoded,) = self._encoder.encode([string], template=add_special_tokens)
        if encoded.problem:
            raise ValueError(f"a text cannot be encoded: {encoded.problem}")
        return encoded.token_ids

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log probability of each text, in windows of the whole context length."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, context, continuation) for context, continuation in found]
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(logprob for logprob, _ in islice(scores, count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate a text per request, up to its first stop string."""
        texts = [""] * len(requests)
        stops: list[list[str]] = []
        prompts: list[TokenizedPrompt] = []
        repeats: Counter[str] = Counter()
        for index, request in enumerate(requests):
            context, settings = request.args
            until, options = _stop_strings(settings)
            seed = derive_seed(self._seed, f"{context}\0{repeats[context]}")
            repeats[context] += 1
            # Others end no row, but cut its text.
            stop = [text for text in until if self._token_bytes and not text_problem(text)]
            params = _sampling_params(options, seed, self._max_gen_toks, stop)
            prompts.append(self._prompt(index, context, params))
            stops.append(until)
        engine = Engine(
            model=self.loaded.model,
            batch_size=self.loaded.batch_size(None),
            eos_token_ids=self._eos_token_ids,
            memory_bytes=self.loaded.cache_memory_bytes(None),
            token_bytes=self._token_bytes,
        )
        for completions in engine.generate(iter(prompts)):
            for completion in completions:
                if completion.error is not None:
                    raise ValueError(completion.error.reason)
                index = completion.prompt.index
                # The whole text, which the harness's own rule cuts: at the stop string that begins
                # first, not at the one that is complete first.
                text = self._decoder.completion_text(
                    completion.prompt_token_ids,
                    completion.token_ids,
                    completion.stop_reason,
                    text_bytes=None,
                )
                texts[index] = _cut(text, stops[index])
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return (log probability, is greedy) per request, in order."""
        answers: list[tuple[float, bool]] = []
        scored = score_windows(self.loaded.model, self._windows(requests))
        for window, scores in scored:
            for (texts, _, _), score in zip(window, scores, strict=True):
                answer = score.logprob, score.is_greedy
                answers.append(answer)
                # windows of loglikelihood_rolling have no texts
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _windows(
        self, requests: Iterable[Request]
    ) -> Iterator[tuple[list[Request], list[TokenPair]]]:
        iterator = iter(requests)
        while window := list(islice(iterator, WINDOW_PAIRS)):
            yield window, [self._pair(context, tokens) for _, context, tokens in window]

    def _pair(self, context: list[int], continuation: list[int]) -> TokenPair:
        problem = "" if context and continuation else "context or continuation has no tokens"
        pair = EncodedPair(context=context, continuation=continuation, problem=problem)
        config = self.gpt_config
        pair = fit(pair, n_positions=config.n_positions, vocab_size=config.vocab_size)
        if pair.problem:
            raise ValueError(pair.problem)
        return TokenPair(pair.context, pair.continuation)

    def _prompt(self, index: int, context: str, params: SamplingParams) -> TokenizedPrompt:
        """Return the prompt of a request: the tokens at its end that leave space for new ones."""
        n_kept = self.max_length - params.max_new_tokens
        if n_kept <= 0:
            raise ValueError(
                f"max_gen_toks ({params.max_new_tokens}) must be less than the context length "
                f"({self.max_length})"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        prompt = Prompt(
            index=index, prompt_id=str(index), text=context, params=params, metadata=None
        )
        kept = tokens[-n_kept:]
        return TokenizedPrompt(
            prompt=prompt, token_ids=kept, tokens_dropped=len(tokens) - len(kept), read_s=0.0
        )


def _stop_strings(settings: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the stop strings of a request, and its other settings."""
    options = dict(settings)
    until = options.pop("until", None) or []
    return [until] if isinstance(until, str) else list(until), options


def _sampling_params(
    options: dict[str, Any], seed: int, default_limit: int, stop: Sequence[str]
) -> SamplingParams:
    """Return the sampling parameters of a request. It is greedy unless do_sample is true.

    Raises:
        ValueError: A setting is not supported, or out of range.
    """
    limits = [options.pop(name, None) for name in _LIMITS]
    limit = next((int(value) for value in limits if value is not None), default_limit)
    temperature = options.pop("temperature", None)
    if not options.pop("do_sample", False):
        temperature = 0.0
    settings: dict[str, Any] = {"top_k": 0} | {
        name: options.pop(name) for name in _SAMPLING if options.get(name) is not None
    }
    if unknown := sorted(name for name, value in options.items() if value is not None):
        raise ValueError(f"generation settings that gptbatch does not have: {', '.join(unknown)}")
    settings |= {
        "seed": seed,
        "temperature": 1.0 if temperature is None else float(temperature),
        "max_new_tokens": limit,
        "stop": tuple(stop),
    }
    for name, value in settings.items():
        setting = SAMPLING_SETTINGS[name]
        is_whole = setting.kind != "int" or type(value) is int
        if not is_whole or not setting.accepts(value):
            raise ValueError(f"generation setting {name} is {value!r}, which is out of range")
    return SamplingParams(**settings)


def _cut(text: str, until: Iterable[str]) -> str:
    """Return the text before the first stop string."""
    positions = [text.find(stop) for stop in until if stop]
    return text[: min((position for position in positions if position >= 0), default=len(text))]


register_model("gptbatch")(GptbatchLM)
