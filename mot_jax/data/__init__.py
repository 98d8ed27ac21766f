"""Text: corpora, tokenizers, windows of fixed length, their order, and batches of them."""
