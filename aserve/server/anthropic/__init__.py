"""The Messages API, over the chat path."""
