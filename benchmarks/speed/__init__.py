"""Speed beside stock SGLang, and the table of it in README.md."""
