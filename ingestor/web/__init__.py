"""The window into a running daemon: health for machines, metrics, and a page for people."""
