"""How many requests fit: loads in equal memory, and the soak, which looks for what is lost over time."""
