"""Which tokens of an image each layer keeps, drawn on the image."""
