"""The report's section on exports, made from the results of ``asr_kd_export --measure``."""

from __future__ import annotations

from typing import Optional, Sequence

from espnet_kd.deploy.measure import exports_table, read_rows
from espnet_kd.report.page import Section, Table
from espnet_kd.report.sections import ReportPart


def show_exports(parts: Sequence[ReportPart]) -> Optional[Section]:
    """Return a section with the costs and error rates of every exported form; None if nothing was measured."""
    section = Section(
        "Exported forms",
        "One thread. Size: of the folder, for the browser with the runtime. Memory: the most that the process had. "
        "First result: the text of the first utterance, after loading. Latency: of a stream, from the end of a "
        "token in the audio until it is known, a mean. Real-time factor: CPU time by time of audio. "
        "Same text: utterances whose text is that of the export for ESPnet. The page for the browser is measured in "
        "onnxruntime, not in a browser.",
    )
    for part in parts:
        for name, path in part.gathered.paths.items():
            rows = read_rows(path)
            if rows:
                head, body = exports_table(rows)
                section.blocks.append(Table(head, body, part.name(name)))
    return section if section.blocks else None
