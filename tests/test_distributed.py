"""Jobs of clusters: devices and log lines of several ranks, jobs that are restarted."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

from attg import trainer
from attg.distributed import processes
from tests.helpers import records, stop_after, train


def test_gpus_of_ranks(monkeypatch):
    """slurm may show a rank all GPUs of its machine, or one."""
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for visible, index in ((8, 3), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)  # noqa: B023
        with processes(None) as (device, _, _):
            assert device == used[-1] == torch.device("cuda", index)


def test_log_lines_are_of_all_ranks(monkeypatch):
    """Means of metrics and of the time spent waiting, sums of signals and images."""
    ours = trainer.Trainer.__new__(trainer.Trainer)
    ours.run = SimpleNamespace(world=2, device=torch.device("cpu"), log=MagicMock())
    ours.run.train_set = SimpleNamespace(max_unreadable=9)
    ours.loader, ours.signals = SimpleNamespace(unreadable=1, waited=3.0), []
    ours.values, ours.meter = [torch.tensor([1.0, 2.0, 3.0])], MagicMock()
    ours.meter.summarize.return_value = ({}, "")
    theirs = torch.tensor([1.5, 2.0, 1.5, 1, 2, 0.5])
    monkeypatch.setattr(trainer.dist, "all_reduce", lambda sums: sums.add_(theirs))
    assert ours.log_steps(5, 0.1, 0.75)
    row = [2.0, 3.0, 3.0]
    ours.meter.summarize.assert_called_once_with(5, [row], 0.1, 0.75, 2.0, 3)


def test_a_restarted_job_continues(trained, labelled, tmp_path, monkeypatch, capsys):
    """With any --resume: otherwise each restart would discard the steps before it."""
    for resume, start in (("none", 0), (str(trained / "last.pt"), 6)):
        out = tmp_path / str(start)
        settings = labelled | {"epochs": 3}
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        with stop_after(3):
            train(out, **settings)  # another command, which is not continued
        assert "the same command resumes\n" in capsys.readouterr().out
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        for step in (start + 2, start + 4):
            with stop_after(2):
                assert train(out, **settings, resume=resume)["step"] == step
            assert "resumes, but without --resume\n" in capsys.readouterr().out
        steps = [r["step"] for r in records(out)]
        assert steps == [*range(start + 1, start + 5)]  # none of the other command
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        with stop_after(2):
            assert train(out, **settings, resume=resume)["step"] == start + 2
