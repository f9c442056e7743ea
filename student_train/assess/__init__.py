"""Evaluation of a student beyond means: by group, calibration, robustness, forgetting, public tasks."""
