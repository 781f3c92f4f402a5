"""Export: what a killed one left beside it goes with the next."""

import tiny_asr

from espnet_kd.distill.export import export


def test_leftovers_of_a_killed_export_are_removed(tmp_path):
    conf = tiny_asr.config()
    exp = tiny_asr.save(tiny_asr.build(conf), conf, tmp_path / "exp")
    for name in (".export.abcd_123", ".export.abcd_123.old"):
        (exp / name).mkdir()
        (exp / name / "model.pth").touch()
    out = export(exp)
    assert {p.name for p in exp.iterdir()} == {"config.yaml", "valid.loss.ave.pth", "export"}
    assert {p.name for p in out.iterdir()} == {"config.yaml", "model.pth"}
