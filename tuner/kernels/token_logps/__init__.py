"""Per-token log-probabilities from hidden states and the head: the one primitive that every loss is built on."""
