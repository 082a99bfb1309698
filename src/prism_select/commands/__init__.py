"""What score, select, repair and pairs do, step by step, and the manifest that they write."""
