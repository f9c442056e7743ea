"""The vLLM plugin that computes signals in the sampler."""
