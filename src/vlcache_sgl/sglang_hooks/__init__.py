"""Everything that knows SGLang, beside `platform`."""
