"""GPU kernels of Native Sparse Attention: plain arrays and ints in, arrays out."""
