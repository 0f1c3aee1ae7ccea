"""The HTTP API: thin Flask over `shared`. Knows no engine and no worker."""
