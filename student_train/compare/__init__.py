"""Served students side by side on the same held-out prompts: `student-train compare`."""
