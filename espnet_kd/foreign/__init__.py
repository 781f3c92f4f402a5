"""CTC models of other toolkits as ESPnet experiments: Hugging Face transformers, and ONNX files."""
