"""Whether answers stay right: experiments on the bundled models, all policies on one server, recall."""
