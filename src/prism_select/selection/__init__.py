"""Scores → verdicts → files: budgets, near-duplicates, baselines, the cascade."""
