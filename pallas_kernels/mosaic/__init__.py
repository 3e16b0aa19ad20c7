"""The toolkit of the Pallas Mosaic GPU kernels (Hopper): launching, packed rows, intervals of keys, matrix products.

Words that the kernels share:

pair: a batch entry and a K/V head; its number is batch entry x K + K/V head.
warpgroup: 128 threads, which multiply matrices of 64 rows. A kernel has one that copies (the producer) and two or three
  that compute (the consumers), side by side on one multiprocessor.
packed rows: the 64 rows of a consumer are 64 / G adjacent queries times the G heads of a group.
tile: what the consumers of one multiprocessor compute together; each multiprocessor works through many tiles.
ring: a few slots of shared memory that the producer fills and the consumers empty, in turn and across tiles.
"""
