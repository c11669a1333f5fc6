"""The service: connects the stages."""
