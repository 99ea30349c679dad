"""Questions whose answers are known."""
