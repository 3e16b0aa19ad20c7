"""One decoding step of all branches over a paged cache; see `contract`."""
