"""What sharing a compressed image costs and saves."""
