"""Pairs → directions: gradients, diagnostics, curvature, low rank, LoRA."""
