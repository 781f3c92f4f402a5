"""The grid of cases (``grid.py``) on every backend (rows, masked, kernels), and the choice of the backend."""

import os
import subprocess
import sys
from pathlib import Path

import grid
import pytest
import reference
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from espnet_kd import backend, losses
from espnet_kd import frames as fr
from espnet_kd.topk import compress

ROOT = Path(__file__).resolve().parents[2]
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]


@pytest.mark.parametrize("name, key", grid.pairs(grid.LOSSES))
def test_grid(name, key, backend):
    grid.check(name, grid.CASES[key], backend)


@pytest.mark.parametrize("name, key", grid.cached_pairs(grid.LOSSES))
def test_grid_of_cached_targets(name, key, backend):
    """Three tokens per frame are kept. On ``rows`` only the type differs from the expected value's computation."""
    grid.check(name, grid.CASES[key], backend, kept=3)


@pytest.mark.trains
def test_grid_of_the_kernels_in_the_interpreter(chosen):
    """This needs a separate process, because the import of Triton decides between its interpreter and a GPU."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/losses/grid.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert int(run.stdout.split()[0]) > len(grid.CASES)


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("name", grid.LOSSES)
    @pytest.mark.parametrize("forced", [None, "masked"])
    @pytest.mark.parametrize("kept", [None, 3])
    def test_grid(self, name, forced, kept, chosen):
        """One test runs all cases of a loss, because separate tests would take longer to report than to run."""
        assert not grid.failures([name], forced, "cuda", kept)

    @pytest.mark.parametrize("width", [1000, 5000, 5001, 9000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kept", [None, 96])
    @pytest.mark.parametrize("name", grid.FUSED)
    def test_large_vocabularies(self, name, width, dtype, kept, chosen):
        grid.check(name, grid.Case((40, 13), width, dtype, exact=False), None, "cuda", kept)

    def test_more_numbers_than_31_bits_count(self, chosen):
        """Offsets in (B, T, V) past 2³¹ do not overflow: the gradient lands in the last utterance, not before it."""
        if torch.cuda.mem_get_info()[0] < 30 * 2**30:
            pytest.skip("needs 30 GB of free GPU memory")
        generator = torch.Generator("cuda").manual_seed(0)
        student = torch.randn(3, 150000, 5000, device="cuda", dtype=torch.float16, generator=generator)
        teacher = student.roll(1, 2)
        student.requires_grad_()
        lengths = torch.tensor([0, 0, 150000], device="cuda")
        losses.factorized_kl(student, teacher, lengths).backward()
        last = student.detach()[2:, -100:].clone().requires_grad_()
        losses.kl(last, teacher[2:, -100:], lengths[:1] + 100).backward()
        assert not student.grad[:2].any() and student.grad[2, -100:].any() and last.grad.any()

    def test_the_kernels_are_what_is_chosen(self, chosen):
        x = torch.zeros(1, 1, 4, device="cuda")
        assert backend.backend_of(x, x) == "fused"
        assert backend.backend_of(x.double(), x) == "masked"

    @pytest.mark.parametrize("name", grid.LOSSES)
    @pytest.mark.parametrize("cached", [False, True])
    def test_nothing_waits(self, name, cached, chosen):
        """With its sync debug mode "error", torch raises if selection, forward or backward waits for the device."""
        if cached and name == "consistency":
            pytest.skip("its second view is a student, never cached")
        student, teacher, lengths, frames, _ = grid.CASES["symmetric"].make("cuda")
        target = compress(teacher, 3) if cached else teacher
        results = []
        for mode in ("default", "error"):  # the first call compiles, which may wait
            leaf = student.detach().requires_grad_()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                frames = fr.select(target, lengths, "symmetric", n=1)
                grid.LOSSES[name](leaf, target, lengths, frames=frames).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            results.append(leaf.grad)
        assert torch.equal(*results)


class TestChoice:
    def test_by_device_and_type(self, chosen):
        x = torch.zeros(1, 1, 4)
        assert backend.backend_of(x, x) == "rows" and backend.may_look(x)
        with FakeTensorMode():
            fake = torch.zeros(1, 1, 4)
            assert backend.backend_of(fake, fake) == "masked" and not backend.may_look(fake)

    def test_a_device_without_triton_is_masked_and_logged(self, chosen, monkeypatch, caplog):
        def broken(device):
            raise RuntimeError("Failed to find C compiler\nmore")

        monkeypatch.setattr("espnet_kd.losses.fused.try_out", broken)
        monkeypatch.setattr(backend, "has_values", lambda x: True)
        backend._kernels_work.cache_clear()
        with FakeTensorMode():
            x = torch.zeros(1, 1, 4, device="cuda")
        try:
            assert backend.backend_of(x, x) == backend.backend_of(x, x) == "masked"
        finally:
            backend._kernels_work.cache_clear()
        assert [r.getMessage() for r in caplog.records if "Triton cannot be used" in r.getMessage()] == [
            "losses on cuda:0: in plain torch, slower, because Triton cannot be used: Failed to find C compiler"
        ]

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match="backend 'gpu'; there are rows, masked, fused"), backend.using("gpu"):
            pass


@pytest.mark.parametrize("name", grid.LOSSES)
def test_frames_past_the_lengths_never_count(name):
    """Frames that are True everywhere, also in the padding, give the same result as no ``frames``."""
    student, teacher, lengths, _ = reference.batch()
    everywhere = torch.ones(student.shape[:2], dtype=torch.bool)
    got = grid.with_gradient(name, student, teacher, lengths, everywhere, {})
    expected = grid.with_gradient(name, student, teacher, lengths, None, {})
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("distance", ["cosine", "l2", "weighted"])
def test_frames_past_the_lengths_never_count_in_representations(distance):
    student, teacher, lengths, _ = reference.batch()
    logits = reference.batch(seed=3)[1]
    results = []
    for frames in (torch.ones(student.shape[:2], dtype=torch.bool), None):
        leaf = student.clone().requires_grad_()
        if distance == "weighted":
            weights = losses.nonblank_mass(logits)
            loss = losses.weighted_representation(leaf, teacher, lengths, weights=weights, frames=frames)
        else:
            loss = losses.factorized_representation(leaf, teacher, logits, lengths, distance=distance, frames=frames)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", grid.LOSSES)
@pytest.mark.parametrize("what", ["frames", "lengths", "teacher", "vocabulary"])
def test_other_sizes_are_refused(name, what):
    student, teacher, lengths, mask = reference.batch()
    if what == "frames":
        options = {"frames": mask[:, :-1]}
    else:
        options = {}
        lengths = lengths[:-1] if what == "lengths" else lengths
        teacher = {"teacher": teacher[:, :-1], "vocabulary": teacher[..., :-1]}.get(what, teacher)
    with pytest.raises(ValueError, match="differ in size"):
        grid.LOSSES[name](student, teacher, lengths, **options)
