"""The colours of every picture, which everybody can tell apart, in grey too (https://jfly.uni-koeln.de/color/)."""

COLORS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#56B4E9")  # blue, green, orange, pink, yellow, sky
