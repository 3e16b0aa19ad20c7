"""The kinds of attention."""
