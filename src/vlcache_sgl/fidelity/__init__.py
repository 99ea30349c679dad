"""Is the answer still right?  Questions with known answers, asked of a real server under many policies and budgets."""
