"""QDQ ONNX -> TVM -> artifact: one shared library with integer kernels for every level."""
