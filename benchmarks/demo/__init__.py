"""The whole line on a small real teacher, on a CPU: `python -m benchmarks.demo`."""
