"""The on-disk contract of a cache: records, Arrow schemas, manifests. schemas/FORMAT.md is normative."""

FORMAT_VERSION = 2
"""Version written into every shard and manifest; readers accept this one and older ones."""
