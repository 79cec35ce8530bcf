"""Tools: what a request says of them, how the model is told, and how its calls are read from its text."""
