"""Direction × pool → scores: engine choice, scorer, shards, plan, processes, Ray actors."""
