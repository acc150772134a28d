"""QDQ ONNX -> integer graph, operator by operator."""
