"""What things cost on the machine at hand, compared in one run."""
