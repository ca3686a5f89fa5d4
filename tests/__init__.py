"""Tests. Imported before any of them: the library sets how threads wait before torch is imported."""

import gptbatch.pipeline  # noqa: F401
