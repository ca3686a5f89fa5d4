"""The model `gptbatch` of lm-evaluation-harness, beside the harness's adapter of transformers."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.score.pairs import PairEncoder
from tests.conftest import SENTENCES
from tests.paths import REPOSITORY
from tests.processes import LIMIT_S, child_environment

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("accelerate", reason="accelerate, which lm-eval's adapter needs, is missing")
# warnings of the harness and of its dependencies
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS: list[dict[str, Any]] = [
    {"question": "The king", "answers": [" is dead", " live", " queen"], "gold": 0},
    {"question": "To be, or not ", "answers": ["to be", "the question"], "gold": 0},
    {"question": "Long live the", "answers": [" king", " queen, and", "?"], "gold": 1},
    {"question": "that is the", "answers": [" question", " king"], "gold": 0},
]
DOCUMENTS = [
    {"text": "The king is dead. Long live the king, and the queen."},
    {"text": "To be, or not to be: that is the question. " * 12},
    {"text": "Who? " * 40},
]
TASKS = {
    "tiny_choice": """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: {folder}/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{answers}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "tiny_perplexity": """
task: tiny_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: {folder}/documents.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "tiny_generation": """
task: tiny_generation
dataset_path: json
dataset_kwargs: {data_files: {test: {folder}/questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answers[gold]}}"
generation_kwargs: {until: [",", "."], max_gen_toks: 20, do_sample: false}
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> tuple[Any, Any]:
    """Return the model of gptbatch and that of transformers, of one tiny checkpoint."""
    from lm_eval.models.huggingface import HFLM

    from gptbatch.lm_eval import GptbatchLM

    theirs = HFLM(
        pretrained=str(checkpoint),
        device="cpu",
        dtype="float32",
        batch_size=4,
        # Version 0.4.13 takes wrong rows from it where one text is cut at two places.
        logits_cache=False,
    )
    return GptbatchLM(model=str(checkpoint), device="cpu"), theirs


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=item, idx=index)
        for index, item in enumerate(arguments)
    ]


def random_texts(rng: random.Random) -> tuple[str, str]:
    text = " ".join(rng.choices(SENTENCES, k=rng.choice([1, 1, 2, 9])))
    cut = rng.randrange(len(text))
    blanks = rng.choice(["", "", " ", "\n ", "  "])
    return text[:cut] + blanks, text[cut:]


def test_pairs_are_encoded_as_the_harness_does(models: tuple[Any, Any], checkpoint: Path) -> None:
    encoder = PairEncoder(load_tokenizer(checkpoint), start_token=0, parse_special=True)
    rng = random.Random(0)
    pairs = [random_texts(rng) for _ in range(400)]
    pairs += [("", "The king"), ("", "<|endoftext|>The king"), ("<|endoftext|>The", " king")]
    for theirs in models:
        seen: list[Any] = []

        def record(found: list[Any], seen: list[Any] = seen, **_: Any) -> list[Any]:
            seen += found
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(theirs, "_loglikelihood_tokens", record)
            usable = [pair for pair in pairs if pair[0] == "" or pair[0].strip()]
            theirs.loglikelihood(requests("loglikelihood", usable), disable_tqdm=True)
        encoded = encoder.encode_pairs(usable)
        for pair, (_, context, continuation) in zip(encoded, seen, strict=True):
            if continuation:
                assert (pair.context, pair.continuation) == (context, continuation)
            else:
                assert pair.problem
    assert sum(pair.boundary_merged for pair in encoded) > 20


def test_log_probabilities_are_those_of_transformers(models: tuple[Any, Any]) -> None:
    """Pairs that are longer than the context included."""
    ours, theirs = models
    rng = random.Random(1)
    found = [random_texts(rng) for _ in range(300)]
    pairs = [
        pair
        for pair in [*found, ("", "The king"), ("The king " * 40, "is dead")]
        if pair[0] == "" or pair[0].strip()
    ]
    pairs = [
        (context, text)
        for context, text in pairs
        if context == "" or 0 < len(ours._encode_pair(context, text)[1]) <= 64
    ]
    assert len(pairs) > 200
    expected = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    scores = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (logprob, is_greedy), (their_logprob, is_their_greedy) in zip(
        scores, expected, strict=True
    ):
        assert logprob == pytest.approx(their_logprob, abs=1e-4)
        assert is_greedy == is_their_greedy
    rng.shuffle(pairs)
    order = dict(zip(pairs, ours.loglikelihood(requests("loglikelihood", pairs)), strict=True))
    again = ours.loglikelihood(requests("loglikelihood", pairs[:7]))
    assert again == [order[pair] for pair in pairs[:7]], "equal bits in another batch"


def test_rolling_log_probabilities_are_those_of_transformers(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    texts = [(document["text"],) for document in DOCUMENTS] + [("",), ("Q",)]
    expected = theirs.loglikelihood_rolling(
        requests("loglikelihood_rolling", texts), disable_tqdm=True
    )
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    assert found == pytest.approx(expected, abs=1e-3, rel=1e-6)
    assert found[3] == 0


def test_greedy_texts_are_those_of_transformers(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    settings = [
        {"until": [",", "."], "max_gen_toks": 20},
        {"until": " the", "max_gen_toks": 9, "do_sample": False},
        {"until": [], "max_new_tokens": 30, "temperature": 0.0},
        {"until": ["ing is", "g", "\ufffd"], "max_gen_toks": 15, "repetition_penalty": 1.3},
    ]
    arguments = [
        (question["question"] * repeats, setting)
        for question in QUESTIONS
        for setting in settings
        for repeats in (1, 9)
    ]
    expected = []
    # one by one: the harness pads a batch on the left, which moves logits by rounding
    for item in arguments:
        expected += theirs.generate_until(requests("generate_until", [item]), disable_tqdm=True)
    found = ours.generate_until(requests("generate_until", arguments))
    assert found == expected
    assert len(set(found)) > 4


def test_sampled_texts_depend_on_their_request_alone(models: tuple[Any, Any]) -> None:
    ours, _ = models
    setting = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 8}
    arguments = [(question["question"], setting) for question in QUESTIONS] * 2
    texts = ours.generate_until(requests("generate_until", arguments))
    assert texts[:4] != texts[4:], "repeated requests have seeds of their own"
    assert ours.generate_until(requests("generate_until", arguments[2:3])) == texts[2:3]
    with pytest.raises(ValueError, match=r"does not have: num_beams"):
        ours.generate_until(requests("generate_until", [("a", {"num_beams": 2})]))
    with pytest.raises(ValueError, match=r"top_k is -1, which is out of range"):
        ours.generate_until(requests("generate_until", [("a", {"top_k": -1})]))
    with pytest.raises(ValueError, match="must be less than the context length"):
        ours.generate_until(requests("generate_until", [("a", {"max_gen_toks": 64})]))


def test_the_example_of_the_documentation_runs() -> None:
    page = (REPOSITORY / "docs" / "scoring.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^<!-- needs lm_eval -->\n```python\n(.*?)^```$", page, re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(example, "example.py", "exec"), names)
    assert -20 < names["logprob"] < 0
    assert names["is_greedy"] in (True, False)


def test_a_model_is_required() -> None:
    from gptbatch.lm_eval import GptbatchLM

    with pytest.raises(ConfigError, match="model is required"):
        GptbatchLM()
    with pytest.raises(ConfigError, match="batch_invariance must be"):
        GptbatchLM(model="x", batch_invariance="maybe")


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of tasks that need no network."""
    for name, rows in (("questions", QUESTIONS), ("documents", DOCUMENTS)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text.replace("{folder}", str(tmp_path)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tasks


def test_tasks_of_the_harness_run(models: tuple[Any, Any], task_folder: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    ours, theirs = (
        lm_eval.simple_evaluate(
            model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
        )
        for model in models
    )
    assert ours["results"].keys() == theirs["results"].keys() == TASKS.keys()
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-6, abs=1e-4), name
    choices = zip(ours["samples"]["tiny_choice"], theirs["samples"]["tiny_choice"], strict=True)
    for our_sample, their_sample in choices:
        logprobs, expected = (
            [logprob for logprob, _ in sample["filtered_resps"]]
            for sample in (our_sample, their_sample)
        )
        assert logprobs == pytest.approx(expected, abs=1e-4)
        assert logprobs.index(max(logprobs)) == expected.index(max(expected))


@pytest.mark.slow
def test_the_command_of_the_harness_knows_the_model(task_folder: Path, checkpoint: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gptbatch.lm_eval", "run", "--model", "gptbatch"),
            *("--model_args", f"model={checkpoint}", "--device", "cpu"),
            *("--tasks", "tiny_choice", "--include_path", str(task_folder)),
        ],
        env=child_environment(HF_DATASETS_CACHE=str(task_folder / "cache"), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choice" in done.stdout
