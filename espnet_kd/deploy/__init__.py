"""A student outside ESPnet: as an ONNX graph, in sherpa-onnx, in a browser, on a stream; and its use everywhere."""
