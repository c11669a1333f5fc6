"""The other side, on this machine: a market, its stream and its REST API, with faults on request."""
