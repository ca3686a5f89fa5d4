"""New tokens per second with each optimization turned off in turn."""
