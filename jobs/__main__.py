"""`python -m jobs` is the command `gptbatch`."""

from jobs.cli import main

main()
