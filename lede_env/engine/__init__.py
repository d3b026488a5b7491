"""The engine: a layered language model, its KV cache, and the rules of one round."""
