"""CTC models of other makers as ESPnet experiments: Hugging Face's, and ONNX files."""
