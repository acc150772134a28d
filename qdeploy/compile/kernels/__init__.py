"""TIR of every kernel, written by hand, and of `prepare`, which packs what they read."""
