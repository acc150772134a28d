"""Quantizers as small torch modules and pure functions, and the network built from them."""
