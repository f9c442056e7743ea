"""Processes, DeepSpeed, checkpoints and the run folder."""
