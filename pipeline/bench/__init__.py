"""Measurements of `gptbatch bench` and of the scripts in benchmarks/; they print nothing."""
