"""Removes personal data from prompts, completions and chains before anything is sent or stored."""
