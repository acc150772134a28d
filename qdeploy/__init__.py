"""qdeploy: elastic, mixed-precision quantized networks, from training to a climbing edge device."""

__version__ = "0.1.0"
