"""Analysis of trained models: mixing weights, entropies, tokens per expert (`mot inspect`)."""
