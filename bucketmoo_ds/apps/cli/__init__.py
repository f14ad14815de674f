"""The `bucketmoo` command, one module a sub-command."""
