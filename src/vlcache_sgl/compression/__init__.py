"""From a finished prefill to a smaller cache."""
