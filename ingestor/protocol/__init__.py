"""The server side of Stream API v1, shared by the simulator and the relay: messages, login, frames, and the port."""
