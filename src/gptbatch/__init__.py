"""gptbatch: reproducible batch text generation with GPT-2.

The API is `gptbatch.pipeline`, the command `gptbatch.jobs`, the bundled files `gptbatch.configs`.
They are folders of the repository's top level; the links beside this file give them one name.
"""
