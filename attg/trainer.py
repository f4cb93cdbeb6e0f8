"""
What surrounds the steps of a pre-training run: its pictures, first words, log, k-NN,
checkpoints and end. Nothing of the method is here.
"""

import dataclasses
import math
import signal
from pathlib import Path

import torch
from torch.utils.data import Subset, default_collate

from attg.checkpoint import (
    find_checkpoint,
    find_model,
    load_optimizer,
    load_scaler,
    restore_resolved,
    save_checkpoint,
)
from attg.cli import out_of_memory, progress
from attg.datasets import max_unreadable, open_data, resolve_dataset
from attg.distributed import (
    all_reduce_sum,
    broadcast_from_rank0,
    choose_precision,
    default_workers,
    exclusive_run,
)
from attg.features import knn_accuracy
from attg.figures import can_draw_curves, save_curves
from attg.files import require
from attg.loader import BatchIterator, ResumableBatchSampler, make_loader
from attg.log import Log, Meter, describe_machine, refuse_not_finite
from attg.maps import open_maps
from attg.pretraining import resolve
from attg.seeding import generator_for
from attg.weights import DECODER


class Run:
    """One run of a Config, on one of `world` processes; signals: see run.stop_signals.

    As a context manager it is the only one that writes to its folder.
    data: of one's own, see attg_mae.train.
    """

    def __init__(self, cfg, device, rank, world, signals, data=None):
        self.cfg, self.device, self.signals = cfg, device, signals
        self.rank, self.world = rank, world
        self.out = Path(cfg.out)
        self.log = Log(self.out, rank)
        # Those that this run settles, which are then no unusual settings.
        self.settled = {"blr"}  # lr tells it
        for name in ("precision", "accum"):
            if getattr(cfg, name) == "auto":
                self.settled.add(name)
        self.start = 0
        self.open_pictures(resolve_dataset(data, cfg.data))
        self.refuse_idle_flags()
        self.steps_per_epoch = max(1, len(self.train_set) // cfg.batch_size)
        self.total_steps = cfg.epochs * self.steps_per_epoch

    def __enter__(self):
        what = f"--out {self.out}"
        self.alone = exclusive_run(self.out / ".lock", what, self.rank, self.world)
        self.alone.__enter__()
        return self

    def __exit__(self, *error):
        return self.alone.__exit__(*error)

    def open_pictures(self, data):
        """train_set, test_set or None, maps (n, h, w) or None, settings of loaders."""
        cfg = self.cfg
        view = {"size": cfg.size, "classes": cfg.classes}
        view |= {"channels": cfg.in_chans, "max_pixels": cfg.max_pixels}
        self.train_set = open_data(data, "train", augment=True, seed=cfg.seed, **view)
        self.test_set = open_data(data, "test", **view)
        self.maps = None
        has_maps = bool(cfg.maps) or self.train_set.masks is not None
        # Guided training is refused without maps; drawing pictures needs none.
        if cfg.guidance != "none" and (has_maps or cfg.epochs > 0):
            self.maps = open_maps(cfg.maps, self.train_set, cfg.data)
        workers = cfg.workers
        if workers is None:
            workers = default_workers(self.device)
        pin_memory = self.device.type == "cuda"
        self.loader_args = {"workers": workers, "pin_memory": pin_memory}

    def refuse_idle_flags(self):
        """ValueError for flags that cannot work or do nothing, before a file is written."""
        cfg = self.cfg
        C = cfg.in_chans
        for name in ("mean", "std"):
            values = getattr(cfg, name)
            words = " ".join(str(value) for value in values)
            require(
                len(values) == C,
                f"--{name} {words}: {len(values)} values, but --in_chans {C}; give {C}, "
                "such as --mean 0.449 --std 0.226 --in_chans 1 for grey pictures",
            )
        require(
            cfg.guidance != "none" or not cfg.maps,
            f"--maps {cfg.maps}: --guidance none uses no maps; leave out one of the two",
        )
        require(
            not cfg.eval_every or self.test_set,
            f"--eval_every {cfg.eval_every}: --data {cfg.data} has no test split to "
            "evaluate on; leave it out",
        )

    def examples(self, count=8):
        """A batched Sample of pictures, evenly spread over the training set."""
        number = len(self.train_set)
        ids = torch.linspace(0, number - 1, min(count, number)).long()
        return default_collate([self.train_set[i] for i in ids.tolist()])

    def find_checkpoint(self, fixed, free):
        """Parts of the checkpoint to continue, or to show if there are no steps, or None.

        See run.find_checkpoint. The first process decides and hands them to the others,
        which need not see its folder: they may be on another machine.
        """
        cfg = self.cfg

        def find():
            if self.total_steps > 0:
                return find_checkpoint(cfg, self.total_steps, self.log, fixed, free)
            same_model = fixed - {"data", "classes", "batch_size", "seed"}
            return find_model(cfg, self.log, same_model)

        parts = broadcast_from_rank0(find, self.rank, self.world)
        if parts:
            restore_resolved(cfg, parts)
        self.precision, self.dtype = choose_precision(
            cfg.precision, self.device, cfg.width
        )
        cfg.precision = self.precision
        return parts

    def resolve_accum(self, model):
        """What --accum auto stands for: as few micro-batches as memory allows."""
        cfg = self.cfg
        if cfg.accum != "auto":
            return
        images, accum = cfg.batch_size // self.world, 1
        while not self.fits(model, images // accum):
            # Halves the micro-batch, or takes what divides the batch next.
            larger = [n for n in range(2 * accum, images + 1) if images % n == 0]
            require(
                larger,
                f"--accum auto: not even {images // accum} image at a time fits into "
                "memory; use a smaller --model, or --precision bf16",
            )
            accum = larger[0]
        cfg.accum = accum
        self.log.say(f"--accum auto: {accum}, {images // accum} images at a time fit")

    def fits(self, model, images):
        """Whether all processes have the memory to train on so many images at a time."""
        fitting = 1
        try:
            dry_run(model, images, self.device, self.dtype)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            fitting = 0
        model.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        (number,) = all_reduce_sum([fitting], self.device, self.world)
        return number == self.world

    def begin(self, model, optimizer, scaler, parts):
        """From the start, or from the parts of a checkpoint: loader, log, first words.

        The model has its weights already.
        """
        cfg = self.cfg
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        if parts:
            self.start, path = parts["step"], parts["path"]
            load_optimizer(optimizer, parts["optimizer"], self.start, path)
            load_scaler(scaler, parts["scaler"], path)
            # or it would stay in memory for the whole run
            parts.clear()
        self.batches = ResumableBatchSampler(
            len(self.train_set),
            cfg.batch_size,
            self.start,
            self.total_steps,
            cfg.seed,
            cfg.accum,
            self.rank,
            self.world,
        )
        self.feed = BatchIterator(self.train_set, self.batches, **self.loader_args)
        self.warmup_steps = cfg.warmup_epochs * self.steps_per_epoch
        self.log.begin(cfg, self.start)
        self.introduce()
        self.meter = Meter(
            self.start,
            self.total_steps,
            self.steps_per_epoch,
            cfg.batch_size,
            self.world,
        )

    def introduce(self):
        """The first words: what will be trained, and which settings are unusual."""
        cfg, say = self.cfg, self.log.say
        say(f"{describe_machine(self.device)}, {self.precision}")

        what = "training a vanilla MAE"
        if self.maps is not None:
            what = f"training an MAE guided by attention maps ({cfg.guidance})"
        if cfg.data == "toy" and cfg.model != "vit_micro":
            what = f"smoke test, on the toy set enlarged: {what}"
        trained = [p.numel() for p in self.model.parameters() if p.requires_grad]
        height, width = cfg.size
        say(
            f"{what}: {cfg.model}, {sum(trained) / 1e6:.1f} M parameters, on "
            f"{len(self.train_set)} images of {cfg.data}, {height} x {width} pixels in "
            f"patches of {cfg.patch_size} x {cfg.patch_size}"
        )

        micro = cfg.batch_size // (cfg.accum * self.world)
        say(
            f"epochs: {cfg.epochs}, steps: {self.total_steps}, images in a step: "
            f"{cfg.batch_size} = {micro} x {self.world} (processes) x {cfg.accum} (--accum)"
        )
        rates = f"lr {cfg.lr:.2e} (base lr {cfg.blr:.2e}) after a warm-up of "
        rates += f"{cfg.warmup_epochs:g} epochs"
        if self.maps is not None:
            rates += f", tau {cfg.tau}"
            if cfg.tau_schedule != "constant":
                rates += f" to {cfg.tau_end}"
        say(rates)

        unusual = " ".join(differences_from_defaults(cfg, self.settled)) or "none"
        say(f"settings that are not the defaults: {unusual}")
        say(f"run folder {self.out}, all settings in its config.json")
        if not can_draw_curves():
            say("curves.png is not drawn: pip install matplotlib, or see log.jsonl")

    def share(self, rows):
        """Rows of a global batch -> (accum, B, ...), this process's of each micro-batch.

        The same rows as those of the pictures; see data.ResumableBatchSampler.
        """
        return rows.unflatten(0, (self.cfg.accum, self.world, -1))[:, self.rank]

    def steps(self):
        """The steps that are left, under a progress bar."""
        return progress(
            range(self.start, self.total_steps),
            initial=self.start,
            total=self.total_steps,
            # None shows it in terminals only
            disable=None if self.rank == 0 else True,
        )

    def evaluation_is_due(self, step):
        every = self.cfg.eval_every * self.steps_per_epoch
        return step > 0 and every > 0 and step % every == 0

    def evaluate(self, step):
        """Logs and returns what the test split says of the model.

        {"val_mse": reconstruction_mse, "knn": {feature: k-NN accuracy}}; without labels there
        is no k-NN, without a test split nothing.
        """
        train_set, test_set = self.train_set, self.test_set
        if not test_set:
            return {}
        setup = (self.loader_args, self.dtype, self.rank, self.world)
        results = {"val_mse": reconstruction_mse(self.model, test_set, *setup)}
        self.log.say(f"step {step}: mse on the test split: {results['val_mse']:.4f}")
        if train_set.labelled and test_set.labelled:
            knn = knn_accuracy(self.model, train_set, test_set, *setup)
            results["knn"] = knn
            words = [f"{name.replace('_', ' ')} {x:.2f} %" for name, x in knn.items()]
            self.log.say(
                f"step {step}: k-NN (k = 20) on the test split: {', '.join(words)}"
            )
        self.log.record({"step": step} | results)
        self.meter.pause()
        return results

    def after(self, done, values, lr, tau):
        """Collects what a step gave, the `done`-th; logs, checks and saves when it is due.

        True: stop here. values (3,): loss, unweighted error, gradient
        norm. Between two log lines nothing waits for the device.
        """
        self.meter.add(values)
        epoch, rest = divmod(done, self.steps_per_epoch)
        # With one process a stop signal need not wait for the log line.
        stop_now = self.signals and self.world == 1
        if rest and done % self.cfg.log_every and not stop_now:
            return False

        stopping = self.write_log(done, lr, tau)
        if rest == 0:
            self.feed.unreadable.clear()
        ended = done == self.total_steps
        at_epoch = rest == 0 and epoch % self.cfg.save_every == 0
        if stopping or ended or at_epoch:
            self.save("last.pt", done)
        every = self.cfg.keep_ckpt_every
        if every and rest == 0 and epoch % every == 0:
            self.save(f"epoch{epoch:04d}.pt", done)
        return stopping and not ended

    def save(self, name, done):
        """The whole state after step `done`, to continue from; the first process does."""
        if self.rank == 0:
            save_checkpoint(
                self.out / name,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                step=done,
                config=dataclasses.asdict(self.cfg),
            )

    def write_log(self, done, lr, tau):
        """Checks and logs the steps since the last line; all processes come here at once.

        Returns whether any of them has received a stop signal.
        """
        rows = self.meter.read()
        counts = [len(self.signals), len(self.feed.unreadable)]
        signals, unreadable = all_reduce_sum(counts, self.device, self.world)
        require(
            unreadable <= max_unreadable(len(self.train_set)),
            f"--data {self.cfg.data}: over 1 % unreadable, {unreadable:.0f} so far",
        )
        refuse_not_finite(rows, done, self.batches, self.precision, self.log)
        waited, self.feed.waited = self.feed.waited, 0.0
        record = self.meter.record(done, rows, lr, tau.item(), waited, int(unreadable))
        self.log.say(self.meter.line(record))
        self.log.record(record)
        return signals > 0

    def stopped(self, done):
        """The result of a run that a signal ended, perhaps one of another process."""
        self.log.say(
            f"stopped by a signal after step {done}; the same command continues"
        )
        number = self.signals[0] if self.signals else signal.SIGTERM
        return self.result(done, stopped=number)

    def finish(self):
        """The result of a run that came to its end: encoder.pt, then the evaluation."""
        if self.rank == 0:
            state = self.model.state_dict()
            encoder = {k: v for k, v in state.items() if not DECODER.match(k)}
            config = dataclasses.asdict(self.cfg)
            save_checkpoint(self.out / "encoder.pt", model=encoder, config=config)
        results = self.evaluate(self.total_steps)
        if self.rank == 0 and can_draw_curves():
            save_curves(self.out / "curves.png", self.log.records())
        self.log.say(f"encoder: {self.out / 'encoder.pt'}")
        return self.result(self.total_steps) | results

    def result(self, step, stopped=None):
        """What train returns of a run without an evaluation."""
        result = {"step": step, "out": str(self.out), "stopped": stopped}
        return result | {"val_mse": None, "knn": {}}


def dry_run(model, images, device, dtype):
    """Forward and backward pass of a micro-batch, which leave nothing but gradients."""
    cfg = model.cfg
    # What comes with the first step: AdamW's two moments, and the copies of the
    # gradients that several processes exchange.
    weights = sum(p.numel() for p in model.parameters())
    reserved = torch.empty(3 * weights, device=device)
    imgs = torch.zeros(images, cfg.in_chans, *cfg.size, device=device)
    ones = torch.ones(images, math.prod(cfg.grid), device=device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss, _, _ = model(imgs, noise=ones, weight=ones)
    loss.backward()
    del reserved


@torch.no_grad()
def reconstruction_mse(model, dataset, loader_args, dtype, rank, world):
    """Mean of the masked patches' error l over a data set: the log's mse, held out.

    Each picture has its own mask, the same in every evaluation and every run.
    """
    cfg, device = model.cfg, model.cls_token.device
    noise = torch.rand(
        len(dataset), math.prod(cfg.grid), generator=generator_for("test masks")
    )
    share = range(rank, len(dataset), world)
    loader = make_loader(Subset(dataset, share), **loader_args)
    total, done = torch.zeros((), device=device), 0
    for sample in progress(loader, desc="held-out error"):
        ids = torch.tensor(share[done : done + len(sample.label)])
        imgs = model.normalize(sample.image.to(device))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            # forward, past torch.compile, which would compile anew for this batch.
            loss, _, _ = model.forward(
                imgs, mask_ratio=cfg.mask_ratio, noise=noise[ids].to(device)
            )
        total += loss * len(ids)
        done += len(ids)
    summed, counted = all_reduce_sum([total.item(), done], device, world)
    return summed / counted


def differences_from_defaults(cfg, without):
    """The flags by which cfg differs from what Config fills in; `without` these names."""
    usual = type(cfg)(model=cfg.model, data=cfg.data, guidance=cfg.guidance)
    sizes = {"epochs": cfg.epochs, "batch_size": cfg.batch_size}
    follows = {"warmup_epochs": None, "lr": None, "blr": None}
    implied = resolve(dataclasses.replace(usual, **sizes))
    usual = resolve(usual)
    flags = []
    for field in dataclasses.fields(cfg):
        default = field.default
        if field.name in follows:
            default = getattr(implied, field.name)
        elif default is None:
            default = getattr(usual, field.name)
        value = getattr(cfg, field.name)
        if value != default and field.name not in without:
            flags.append(as_flag(field.name, value))
    return flags


def as_flag(name, value):
    """As it would be typed."""
    if value is True:
        return f"--{name}"
    if value is False:
        return f"--no-{name}"
    if isinstance(value, tuple | list):
        value = " ".join(str(x) for x in value)
    return f"--{name} {value}"
