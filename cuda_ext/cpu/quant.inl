// Quantised linear layers: GGUF weights kept packed, int8 activations.
