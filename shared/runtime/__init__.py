"""Where am I, what fits, what is already built: the lowest floor of `shared`."""
