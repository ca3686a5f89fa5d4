"""Checks of this machine, for `gptbatch doctor`: each a probe that returns a section."""
