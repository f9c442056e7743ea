"""Measurements of stillroom that anyone can repeat, one runnable module a subject."""
