"""Bundled configs and the demo's prompts and model, found by name through `bundled:` (see pipeline/system/bundled.py)."""
