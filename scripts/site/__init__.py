"""The documentation site, made of the pages as they are: `make docs`."""
