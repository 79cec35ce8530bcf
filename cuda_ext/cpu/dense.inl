// Dense linear layers: float32, bfloat16 and float16 weights, float32 arithmetic.
