"""Right answers of the text checkpoint at full cache, by task and size: `python -m models.smollm2.measure`."""
