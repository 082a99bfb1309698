"""What a run is: options, configuration, folder, progress, errors."""
