"""What the cache keeps of one image, drawn."""
