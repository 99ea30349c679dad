"""Statistics of attention that policies decide by."""
