"""Choice of the blocks that each query reads; see `contract`."""
