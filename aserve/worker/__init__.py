"""The body: one device, its model, its KV cache and its persistent batch."""
