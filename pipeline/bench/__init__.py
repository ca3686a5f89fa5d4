"""What `gptbatch bench` measures. Knows the engine and the network; does not print."""
