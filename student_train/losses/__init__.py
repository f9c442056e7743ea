"""Losses on a teacher known in part: divergences, targets, and a head that computes both at once without the logits."""
