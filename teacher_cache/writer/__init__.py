"""Completions to rows, shards and commits."""
