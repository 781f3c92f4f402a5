"""Export of students as ONNX graphs, for sherpa-onnx, browsers and streaming, and recognition with any export."""
