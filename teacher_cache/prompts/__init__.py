"""Prompts to generate from and completions to score: files, datasets, task generators, other caches."""
