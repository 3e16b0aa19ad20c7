"""Attention over the blocks that each query selected; see `contract`."""
