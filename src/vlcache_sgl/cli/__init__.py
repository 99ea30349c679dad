"""The `vlcache` command."""
