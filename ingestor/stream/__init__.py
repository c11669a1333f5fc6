"""The stream: connects, authenticates, keeps alive, reconnects; the daemon's only user of `websockets`."""
