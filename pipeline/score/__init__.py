"""Log probabilities of given continuations: the command `score`, and an lm-eval model."""
