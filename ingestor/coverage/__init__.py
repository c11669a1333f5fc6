"""Coverage: when the market trades, and what of that time was heard."""
