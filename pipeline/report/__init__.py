"""The report of a run: one HTML file that needs no network, for `gptbatch report`."""
