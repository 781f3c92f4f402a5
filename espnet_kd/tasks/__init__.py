"""The task asr_kd, on ESPnet's ASR task."""
