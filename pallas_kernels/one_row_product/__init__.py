"""A product of one row with a matrix, as a decoding step makes it of every parameter: bound by reading the matrix."""
