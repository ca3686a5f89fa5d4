"""Tests. Imported before any of them: the library sets how threads wait before torch is imported."""

import pipeline  # noqa: F401
