"""Post-training quantization: a trained float ONNX file and some images become QDQ ONNX, one file or a ladder."""
