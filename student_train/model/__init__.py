"""The student model: loading, packed attention, pruning, saving."""
