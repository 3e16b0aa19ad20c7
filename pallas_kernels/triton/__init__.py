"""The toolkit of the Pallas Triton kernels: launching, packed rows, heads in pieces, softmax steps, tile tables."""
