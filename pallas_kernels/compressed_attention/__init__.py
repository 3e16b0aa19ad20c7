"""Attention over compressed tokens; see `contract`."""
