"""Maintenance of a cache: verify, quarantine, gc, copy."""
