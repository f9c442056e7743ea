"""The codec `archive`: columns of `topk-u8` as two streams of an entropy coder. Compiled by numba on first use."""
