"""Where the corpora come from, one module a source."""
