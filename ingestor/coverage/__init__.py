"""Coverage: the trading calendar, and the report of covered time and gaps."""
