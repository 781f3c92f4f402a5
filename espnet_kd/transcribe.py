"""Recognise audio files from Python.

    from espnet_kd.transcribe import Transcriber
    student = Transcriber("exp/student_progressive_fkl/export_onnx")
    print(student("speech.flac").text)

The model may be an export of any format, or an experiment. Neither torch nor ESPnet is needed for the formats
onnx, sherpa and web.
"""

from espnet_kd.deploy.transcriber import Transcriber
from espnet_kd.deploy.transcript import Segment, Token, Transcript

__all__ = ["Segment", "Token", "Transcriber", "Transcript"]
