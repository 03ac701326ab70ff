"""What a model lost and gained: perplexity, KL divergence, generation, latency, memory."""
