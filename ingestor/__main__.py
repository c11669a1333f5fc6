"""``python -m ingestor`` is the same as ``ingestor``."""

from ingestor.cli import main

if __name__ == "__main__":
    main()
