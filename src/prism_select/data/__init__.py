"""Files → rows → examples and pairs → tokens → batches."""
