"""The YAML of `student-train init`, `plan`, `run`, `eval` and `export`."""
