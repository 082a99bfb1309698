"""Causal language models: loading, adapters, layer selection, LoRA training, generation."""
