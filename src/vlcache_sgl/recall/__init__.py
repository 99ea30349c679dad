"""What was evicted comes back: which evicted tokens a decode step needs, by a sketch of their keys."""
