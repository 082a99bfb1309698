"""Does the choice help? Retraining on it and on baselines, controls, results."""
