"""gptbatch: reproducible batch text generation with GPT-2.

    import gptbatch

    table = gptbatch.generate(["KING:"], model="gpt2", temperature=0.8)

`generate`, `LLM` and `unload` are imported on first use, and `__version__` is looked up then. The
API of jobs is `gptbatch.pipeline`, the command `gptbatch.jobs`, the bundled files
`gptbatch.configs`. They are folders of the repository's top level; the links beside this file give
them one name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptbatch.llm import LLM, generate, unload

__all__ = ["LLM", "generate", "unload"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gptbatch")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("gptbatch.llm"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
