"""A run's state and its directory: TrainState, optimizer, checkpoints, metrics, scores."""
