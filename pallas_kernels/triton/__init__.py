"""The toolkit of the Pallas Triton kernels: launching, packed rows, heads in pieces, softmax steps, tile tables.

Words that the kernels share:

pair: a batch entry and a K/V head, which every program works for; its number is batch entry x K + K/V head.
group: the G = H / K query heads of a K/V head. They share keys and values, so a tile packs them into its rows.
tile: a matrix of scores that a program holds at a time, packed query rows by keys or the reverse.
piece: a part of the head size whose width is a power of two, as the sides of Triton's matrices must be.
edge: of a step of a loop over tiles, that some query of the tile does not see some key of it.
"""
