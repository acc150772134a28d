"""Frozen network -> QDQ ONNX that stock runtimes run and that bundle and compile can take."""

from qdeploy.export.write import export_onnx

__all__ = ["export_onnx"]
