"""Reading GGUF files: header, metadata, configuration. Tensors are decoded in ``aserve.model.loader``."""
