"""Statistics of attention that policies decide by, collected during the prefill."""
