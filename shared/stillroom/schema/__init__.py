"""The on-disk contract of a stillroom cache, and nothing else. FORMAT.md in this folder is normative."""

FORMAT_VERSION = 2
"""Major version written into every shard and manifest; readers accept this version and older ones."""
