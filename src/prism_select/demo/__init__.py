"""The bundled model, the small world that it read about, and `prism demo`."""
