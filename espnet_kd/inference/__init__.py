"""An ESPnet model over batches of audio: encoder outputs, exact padding, frame shift, greedy decoding."""
