"""Finding policies by name and putting scorer, allocator and selection together."""
