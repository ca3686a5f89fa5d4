"""How long a run will take, and how much memory and disk: `gptbatch plan`."""
