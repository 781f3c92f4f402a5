"""The task asr_kd, on ESPnet's ASR task."""

import espnet_kd.offline  # noqa: F401  (before the task's own modules import other parts of ESPnet)
