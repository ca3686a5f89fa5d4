"""`python -m gptbatch.lm_eval ...` is `lm_eval ...` with `--model gptbatch`.

Importing this module registers the model `gptbatch` in lm-evaluation-harness.
"""

from gptbatch.pipeline.score.harness import GptbatchLM

__all__ = ["GptbatchLM"]

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
