"""What every arm shares: the case, the weights and tokens, the ranks, the measurement, the tables."""
