"""What a model costs: BitOPs and memory (pure), latency (measured)."""
