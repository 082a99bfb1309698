"""The method on tensors: log-likelihood, gain, gradient, engines, statistics."""
