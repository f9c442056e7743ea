"""Verdicts on chains: while a build runs, afterwards, and by a language model."""
