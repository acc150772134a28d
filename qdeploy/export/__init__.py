"""Frozen network -> QDQ ONNX under a written contract, checked by a parity gate."""
