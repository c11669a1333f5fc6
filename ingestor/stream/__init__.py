"""The stream: connection, authentication, keepalive and retry. Of the daemon only this package uses `websockets`."""
