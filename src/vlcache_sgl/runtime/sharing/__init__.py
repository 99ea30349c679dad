"""One picture, many questions: what a shared prefix keeps, what it lacks, and how it gets it back."""
