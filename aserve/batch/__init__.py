"""Requests from a file, answered into a file."""
