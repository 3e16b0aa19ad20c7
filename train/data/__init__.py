"""From files to batches: formats, documents, conversations, tokenizers, packing and loading."""
