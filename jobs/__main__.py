"""`python -m jobs` is the command `gptbatch`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
