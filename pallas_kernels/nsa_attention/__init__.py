"""The whole of Native Sparse Attention as one op; see `contract`."""
