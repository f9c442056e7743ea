"""What a run reads, in how many steps and with how much memory, before a model is loaded."""
