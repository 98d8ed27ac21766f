"""Text generation, gap filling and scoring with a trained model in an inference mode."""
