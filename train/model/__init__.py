"""The transformer: its layers, the kinds of attention, the mixture of experts and the loss."""
