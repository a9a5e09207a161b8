"""How good is it, compared with what, and is the difference real: metrics, baselines, statistics, timing."""
