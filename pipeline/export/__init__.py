"""Files for readers that know nothing of gptbatch: the rows of a run as JSON lines or Parquet."""
