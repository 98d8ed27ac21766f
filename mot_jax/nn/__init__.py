"""Layers, losses and sharding of the model."""
