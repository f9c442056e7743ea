"""The trainer beside DistillKit and TRL."""
