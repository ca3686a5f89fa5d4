"""Bundled configs, and the prompts and the model of the demo. `bundled:NAME` finds its files."""
