"""Runs a build: requests through an engine into a cache."""
