"""The newest few tokens of each row written into a paged cache; see `contract`."""
