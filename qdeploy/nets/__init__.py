"""Plain float torch backbones; nothing here knows about quantization."""
