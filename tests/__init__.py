"""Tests of gptbatch.

The package is imported first: it sets how OpenMP threads wait, before torch is imported.
"""

import gptbatch.pipeline  # noqa: F401
