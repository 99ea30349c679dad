"""SGLang's attention over cells: one backend, exchangeable kernel providers."""
