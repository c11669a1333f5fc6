"""What the daemon costs, measured against its peers and its limits in turn in one run: `make bench`."""
