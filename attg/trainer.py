"""
A pre-training run around its steps: setup, log, evaluation, checkpoints. Nothing of the
method is here; see attg_mae.train.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Subset

from attg.checkpoint import check_resume, find_checkpoint, save_checkpoint
from attg.datasets import open_data, resolve_dataset
from attg.distributed import barrier, broadcast_from_rank0, exclusive_run
from attg.export import timm_arguments
from attg.features import knn_accuracy
from attg.figures import panels_of, plot_panels
from attg.images import ImageData, generator_for, sha256_of
from attg.loader import default_workers, make_loader
from attg.log import Log, Meter, progress, read_log
from attg.map_job import check_repeatable
from attg.maps import open_maps
from attg.pretraining import resolve
from attg.weights import DECODER_KEYS

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings, processes and data of a run, before its model exists."""

    cfg: object  # attg_mae.Config, resolved
    device: torch.device
    rank: int
    world: int
    log: Log
    train_set: ImageData
    test_set: ImageData | None
    data_id: str | None  # fingerprint of train_set, on rank 0
    maps: np.ndarray | None  # (n, h, w) on the host
    maps_id: str | None  # checksum of the maps
    steps_per_epoch: int
    total_steps: int
    dtype: torch.dtype | None  # of autocast, None for fp32
    workers: int  # of the loader


@contextlib.contextmanager
def setup(cfg, data, dist_info, signals, on_log=None):
    """(Run, checkpoint to resume or None), while this run has its folder to itself.

    data, on_log: see attg_mae.train. dist_info: (device, rank, world). signals: see
    attg.distributed.stop_signals.
    """
    device, rank, world = dist_info
    log = Log(rank == 0, [on_log] if on_log else [], signals)
    name = cfg.data if data is None else resolve_dataset(data, cfg.data)
    view = {"classes": cfg.classes, "channels": cfg.in_chans}
    view |= {"max_pixels": cfg.max_pixels, "white": cfg.white}
    view |= {"verify": cfg.verify == "full", "size": cfg.img_size}
    train_set = open_data(name, "train", augment=True, seed=cfg.seed, **view)
    test_set = open_data(name, "test", **view)
    if world > 1:
        check_same_images(cfg, filter(None, (train_set, test_set)), rank)
    cfg = resolve(cfg, train_set)
    if cfg.img_size != view["size"]:
        for dataset in filter(None, (train_set, test_set)):
            dataset.size = cfg.size
    if cfg.eval_every and test_set is None:
        reason = f"--data {cfg.data} has no test split; leave it out"
        raise ValueError(f"--eval_every {cfg.eval_every}: {reason}")
    if cfg.eval_every is None:
        cfg.eval_every = 0 if test_set is None else math.ceil(cfg.epochs / 4)
    maps = None if cfg.guidance == "none" else train_set.masks
    maps_id = None if maps is None else "masks of the data set"
    # Drawing examples (--epochs 0) works without maps, guided training does not.
    workers = default_workers(device) if cfg.workers is None else cfg.workers
    if cfg.maps or (cfg.guidance != "none" and maps is None and cfg.epochs > 0):
        maps, maps_id = open_maps(cfg.maps, train_set, cfg.data, log.info)
        check_repeatable(train_set, workers)

    steps_per_epoch = max(1, train_set.num_images // cfg.batch_size)
    total_steps = cfg.epochs * steps_per_epoch
    total_steps = min(total_steps, cfg.max_steps or total_steps)
    with exclusive_run(Path(cfg.out, ".lock"), f"--out {cfg.out}"):
        # On rank 0, as others need not share the folder.
        find = functools.partial(find_checkpoint, cfg, train_set, maps_id)
        checkpoint = broadcast_from_rank0(find)
        if checkpoint:
            changed = check_resume(cfg, checkpoint, total_steps)
            log.continues = Path(checkpoint["path"]).parent == Path(cfg.out)
            where = f"{checkpoint['path']} after step {checkpoint['step']}"
            changes = f" with {', '.join(changed)}" if changed else ""
            log.info(f"resuming {where}{changes}" if cfg.epochs else f"from {where}")
            if checkpoint["step"] == total_steps:
                log.info("nothing left to train: only its evaluation is repeated")
        data_id = train_set.fingerprint if rank == 0 and cfg.epochs else None
        sets = (train_set, test_set, data_id, maps, maps_id)
        steps = (steps_per_epoch, total_steps, DTYPES[cfg.precision], workers)
        yield Run(cfg, device, rank, world, log, *sets, *steps), checkpoint


def check_same_images(cfg, datasets, rank):
    """ValueError if the data folders of this rank and rank 0 hold different images."""
    names = [
        (len(x), sha256_of(*x.names) if x.pairs is None else x.fingerprint)
        for x in datasets
    ]
    expected = broadcast_from_rank0(lambda: names)
    if names != expected:
        numbers = [[number for number, _ in x] for x in (names, expected)]
        reason = f"{numbers[0]} images (training, test), rank 0 {numbers[1]}, or others"
        reason += "; copy the images of rank 0"
        raise ValueError(f"--data {cfg.data}: rank {rank} has {reason}")


def result(run, step, stopped=None, val_mse=None, knn=None):
    """The return value of attg_mae.train."""
    metrics = {"val_mse": val_mse, "knn": knn or {}}
    return {"step": step, "out": str(run.cfg.out), "stopped": stopped} | metrics


@torch.no_grad()
def reconstruction_mse(model, dataset, run):
    """Unweighted mse of the masked patches over a data set, the mean over all ranks.

    Each image has its own mask, the same in every evaluation and every run.
    """
    cfg = model.cfg
    generator = generator_for("test masks")
    noise = torch.rand(len(dataset), math.prod(cfg.grid), generator=generator)
    shard = range(run.rank, len(dataset), run.world)
    total, done = torch.zeros((), device=run.device), 0
    loader = make_loader(Subset(dataset, shard), workers=run.workers)
    for sample in progress(loader, desc="mse of the test split"):
        ids = torch.tensor(shard[done : done + len(sample.label)])
        imgs = model.normalize(sample.image.to(run.device))
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
            # forward bypasses torch.compile, which would recompile for this batch size.
            loss, _, _ = model.forward(imgs, noise=noise[ids].to(run.device))
        total += loss * len(ids)
        done += len(ids)
    sums = torch.stack([total, torch.tensor(float(done), device=run.device)])
    if run.world > 1:
        dist.all_reduce(sums)
    summed, count = sums.tolist()
    return summed / count


class Trainer:
    """Log, evaluations and checkpoints of a run that has done `start` steps.

    signals: list of stop signals received, see attg.distributed. loader:
    attg.loader.BatchIterator.
    """

    def __init__(self, run, model, optimizer, scaler, start, signals, loader):
        cfg = run.cfg
        self.run, self.signals, self.loader = run, signals, loader
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        # Metrics (3,) of the steps since the last log line: loss, mse, gradient norm.
        # They stay on the device, so that no step waits for it.
        self.values = []
        # The last evaluation is in finish.
        every = cfg.eval_every * run.steps_per_epoch
        self.eval_steps = range(every, run.total_steps, every) if every else ()
        if start == 0:
            # So a log with steps but no checkpoint means that the checkpoint was lost.
            self.save("last.pt", 0)
        steps = range(start, run.total_steps)
        self.steps = progress(steps, initial=start, total=run.total_steps)
        run.log.begin(run, model, start)
        self.meter = Meter(run, start)

    def after_step(self, done, values, lr, tau):
        """Log, check and save when it is due after step `done`; True = stop here.

        values (3,): loss, unweighted mse, gradient norm. Nothing waits for the device
        between two log lines.
        """
        cfg = self.run.cfg
        self.values.append(values)
        epoch, rest = divmod(done, self.run.steps_per_epoch)
        # A single process need not wait for a log line to agree on a stop signal.
        stop_now = self.signals and self.run.world == 1
        ended = done == self.run.total_steps  # in mid-epoch with --max_steps
        if rest and done % cfg.log_every and not stop_now and not ended:
            return False

        stopping = self.log_steps(done, lr, tau.item())
        if stopping or ended or (rest == 0 and epoch % cfg.save_every == 0):
            self.save("last.pt", done)
        if cfg.keep_ckpt_every and rest == 0 and epoch % cfg.keep_ckpt_every == 0:
            self.save(f"epoch{epoch:04d}.pt", done)
        return stopping and not ended

    def log_steps(self, done, lr, tau):
        """Check and log the steps since the last log line, on all ranks at once.

        Returns whether any rank has received a stop signal.
        """
        run, loader = self.run, self.loader
        counts = [len(self.signals), loader.unreadable, loader.waited / run.world]
        counts = torch.tensor(counts, dtype=torch.float32, device=run.device)
        means = torch.stack(self.values) / run.world
        self.values.clear()
        # One collective for everything.
        sums = torch.cat([means.flatten(), counts])
        if run.world > 1:
            dist.all_reduce(sums)
        *flat, signals, unreadable, waited = sums.tolist()
        rows = [flat[i : i + 3] for i in range(0, len(flat), 3)]

        if unreadable > run.train_set.max_unreadable:
            reason = f"over 1 % of the images are unreadable, {unreadable:.0f} so far"
            raise ValueError(f"--data {run.cfg.data}: {reason}; repair or remove them")
        if not math.isfinite(sum(flat)):
            self.check_finite(rows, done)
        loader.waited = 0.0
        summary = self.meter.summarize(done, rows, lr, tau, waited, int(unreadable))
        run.log.write(*summary)
        return signals > 0

    def check_finite(self, rows, done):
        """ValueError for the first step with a part that is not finite, see `parts`.

        rows: [loss, mse, gradient norm] of the steps up to `done`. With fp16 the gradient
        scaler skips steps of infinite gradients.
        """
        for step, (loss, mse, grad_norm) in enumerate(rows, done - len(rows)):
            parts = {"prediction or input": mse, "patch weight": loss}
            if self.run.cfg.precision != "fp16":
                parts["gradient"] = grad_norm
            bad = [name for name, value in parts.items() if not math.isfinite(value)]
            if not bad:
                continue
            message = f"step {step + 1}: {bad[0]} not finite"
            ids = self.loader.sampler.indices(step).tolist()
            record = {"step": step + 1, "not_finite": bad[0], "indices": ids}
            self.run.log.write(record, message)
            raise ValueError(
                f"{message}; images {ids[:9]} ... (all in log.jsonl). Checkpoints are of "
                "earlier steps. Try a lower --lr, --clip_grad 1 or --precision fp32"
            )

    def evaluate(self, step):
        """Log and return the metrics on the test split.

        {"val_mse": see reconstruction_mse, "knn": {feature: top-1 in percent}}, without
        knn if there are no labels; {} without a test split.
        """
        run, test_set = self.run, self.run.test_set
        if test_set is None:
            return {}
        mse = reconstruction_mse(self.model, test_set, run)
        metrics, line = {"val_mse": mse}, f"step {step}: test split: mse {mse:.4f}"
        if run.train_set.labeled and test_set.labeled:
            options = run.train_set, test_set, run.dtype, run.rank, run.world
            metrics["knn"] = knn_accuracy(self.model, *options, workers=run.workers)
            for name, accuracy in metrics["knn"].items():
                name = name.replace("_", " ")
                line += f", k-NN (k = 20) of the {name} {accuracy:.2f} %"
        run.log.write({"step": step} | metrics, line)
        # Not part of the speed of the steps.
        self.meter.logged = time.perf_counter()
        return metrics

    def save(self, name, done):
        """Write a checkpoint of the state after step `done`, on rank 0."""
        if self.run.rank == 0:
            save_checkpoint(
                Path(self.run.cfg.out, name),
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                step=done,
                data=self.run.data_id,
                maps=self.run.maps_id,
                config=dataclasses.asdict(self.run.cfg),
            )

    def stop(self, done):
        """The result of a run that a signal stopped, on this rank or another."""
        # Launchers kill all ranks once one has exited: rank 0 may still be saving.
        barrier()
        text = f"stopped by a signal after step {done}; the same command resumes"
        if self.run.cfg.resume != "auto":
            text += ", but without --resume"
        self.run.log.info(text)
        number = self.signals[0] if self.signals else signal.SIGTERM
        return result(self.run, done, stopped=number)

    def finish(self):
        """Write encoder.pt, evaluate and draw the curves; the result of a complete run."""
        run, out = self.run, Path(self.run.cfg.out)
        if run.rank == 0:
            state = self.model.state_dict()
            encoder = {k: v for k, v in state.items() if not DECODER_KEYS.match(k)}
            config = dataclasses.asdict(run.cfg)
            timm = timm_arguments(run.cfg)
            save_checkpoint(out / "encoder.pt", model=encoder, config=config, timm=timm)
        run.log.info(f"encoder: {out / 'encoder.pt'}")
        metrics = self.evaluate(run.total_steps)
        if run.rank == 0:
            plot_panels(out / "curves.png", panels_of(read_log(out / "log.jsonl")))
        return result(run, run.total_steps, **metrics)
