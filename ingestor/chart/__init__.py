"""Candles, volume and gaps over trading time: drawn as SVG, or as text for a terminal. No I/O."""
