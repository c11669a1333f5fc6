"""Charts of candles, volume and gaps over trading time, as SVG or as text for a terminal. No I/O."""
