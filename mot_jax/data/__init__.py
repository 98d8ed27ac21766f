"""Text: corpora, tokenizers, windows of fixed length, their order, and batches of them."""

DATA_DIRECTORY = "~/.cache/mot_jax"  # of prepared text, where a config names no other
