"""Sliding window attention; see `contract`."""
