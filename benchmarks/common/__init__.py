"""What several subjects use: the machine they ran on, prompts and timing, results, generated parts of pages."""
