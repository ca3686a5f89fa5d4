"""`python -m gptbatch` runs the command `gptbatch`."""

from gptbatch.jobs.cli import main

if __name__ == "__main__":
    main()
