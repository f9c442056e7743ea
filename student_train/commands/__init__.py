"""The commands of `student-train`: their options, what they call, and what they print."""
