"""The `vlcache` command: a file per subcommand."""
