"""What the cache keeps of one picture, as a picture."""
