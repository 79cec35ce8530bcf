"""From logits to tokens: penalties, truncation, the draw, log-probabilities."""
