"""Runs the teacher once and keeps what it said: fills a cache through vLLM."""
