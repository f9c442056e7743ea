"""Judges of answers, each run in a process with limits."""
