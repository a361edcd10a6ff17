"""Runs the stages of an experiment in order into one run directory; starting again continues."""

import logging
import pickle
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchmetrics import Metric

from lvd_lightning import __version__
from lvd_lightning.context import DONE_MARKER, StageContext, missing_need
from lvd_lightning.events import record, recording
from lvd_lightning.files import unreadable, write_atomically, write_json
from lvd_lightning.ranks import Ranks, stop_together
from lvd_lightning.runs.checkpoint import BEST_CHECKPOINT, EpochCheckpoint
from lvd_lightning.runs.data_record import adopt_data, check_same_data, record_data, stages_with_data
from lvd_lightning.runs.epoch_seed import EpochSeed
from lvd_lightning.runs.evaluation import evaluate_run, is_evaluated, mean_likelihood
from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.runs.lock import locked
from lvd_lightning.runs.machine import MachineLog, peak_memory
from lvd_lightning.runs.metrics_file import MetricsFile
from lvd_lightning.runs.old_codes import check_codes
from lvd_lightning.runs.progress import EpochLines, Noted, ProgressBar
from lvd_lightning.runs.rank_agreement import RankAgreement
from lvd_lightning.runs.report import is_written, plain_table, summarize, write_report
from lvd_lightning.runs.resuming import where_to_resume
from lvd_lightning.runs.run import Run
from lvd_lightning.runs.run_directory import adopt_run_directory, check_trained_with, record_stage
from lvd_lightning.runs.settings import EVALUATE, REPORT
from lvd_lightning.runs.step_checkpoint import StepCheckpoint
from lvd_lightning.runs.still_there import StillThere
from lvd_lightning.runs.stopwatch import Stopwatch
from lvd_lightning.runs.wandb_run import StageLogger, WandbRun
from lvd_lightning.seeds import derive_seed
from lvd_lightning.stages.stage import PlainStage, Stage, StageModule
from lvd_lightning.stopping import EXIT_CODE, Stopped
from lvd_lightning.traffic import TRAFFIC

__all__ = ["Pipeline"]

METRICS = "metrics.csv"


class Pipeline:
    """One experiment on the processes of one job.

    A stage is finished when its folder holds done.json, which is written last. A stage that was interrupted goes on
    from its last epoch-end checkpoint, and ends as it would have without the interruption if its module derives its
    random numbers from (seed, stage, epoch).
    """

    def __init__(self, experiment: Experiment, ranks: Ranks) -> None:
        self.experiment = experiment
        self.result = Run(experiment)
        self.ranks = ranks
        settings = experiment.wandb
        self.wandb = None if settings is None else WandbRun(experiment.run_dir, settings, experiment.config)
        self._data: dict[Callable[[], LightningDataModule], LightningDataModule] = {}
        _quieten_lightning()

    def run(self, only: str | None = None, changed: str = "refuse") -> None:
        """Run every stage that is not finished, or the stage `only`.

        What there is to evaluate is evaluated, and reported, as soon as the last stage that leaves a model is
        finished; stages after it, which compare that model with others, complete the report.

        changed: what to do when the run directory was begun with another configuration, see `adopt_run_directory`.

        Raises:
            ValueError: another process is working on the run directory, or a stage needs what none leaves.
        """
        stages = self.experiment.stages if only is None else (self.experiment.stage(only),)
        for stage in stages:
            self._check(stage)
        models = [stage for stage in stages if "model" in stage.kind.leaves]
        with ExitStack() as held:
            self.ranks.on_first(partial(held.enter_context, locked(self.experiment.run_dir)))
            held.enter_context(recording(self.experiment.run_dir, self.ranks.rank))
            held.push(_record_end)
            record("start", version=__version__, ranks=self.ranks.world_size, stage=only)
            self.ranks.on_first(partial(check_codes, self.experiment))
            self.ranks.on_first(partial(adopt_run_directory, self.experiment, changed))
            self._adopt_data(changed)
            held.push(self._close_wandb)
            for stage in stages:
                self._stop_if_asked()
                try:
                    self._run_stage(stage)
                except Exception as error:
                    self._keep_details(stage, error)
                    raise
                if only is None and models and stage is models[-1] and stage is not stages[-1]:
                    self._evaluate(unless_reported=True)
            self._stop_if_asked()
            if only is None:
                self._evaluate()

    def _close_wandb(self, kind: Any, error: BaseException | None, details: Any) -> None:
        if self.wandb is not None:
            self.wandb.finish(0 if error is None else EXIT_CODE if isinstance(error, Stopped) else 1)

    def _stop_if_asked(self) -> None:
        """Between stages."""
        number = stop_together()
        if number is not None:
            raise Stopped(number)

    def print_likelihood(self, split: str) -> None:
        """Print what the run's final model reaches on "val" or "test"; nothing is written."""
        self.ranks.on_first(partial(check_codes, self.experiment))
        stage = self.result.final_stage()
        check_trained_with(self.experiment, stage.name)
        data = self.datamodule()
        self.ranks.on_first(partial(check_same_data, self.experiment, stage.name, data))
        found = mean_likelihood(stage.model(self.ranks.device), data, split, self.ranks)
        unit, facts = data.unit, "".join(f", {key} {value}" for key, value in data.facts.items() if value is not False)
        note = Noted(unit.name, data.protocol).beside(unit.name)
        self.say(f"{split}/{unit.name} {found:.4f}{note}  ({stage.folder}, {data.num_examples(split)} examples{facts})")

    def datamodule(self, make: Callable[[], LightningDataModule] | None = None) -> Any:
        """The datamodule that `make` makes (the experiment's own by default), set up; made once."""
        make = self.experiment.data if make is None else make
        if make not in self._data:
            data = make()
            if self.ranks.local_rank == 0:
                data.prepare_data()
            self.ranks.wait()
            data.setup("fit")
            self._data[make] = data
        return self._data[make]

    def say(self, text: str) -> None:
        if self.ranks.is_first:
            print(text, flush=True)

    def _adopt_data(self, changed: str) -> None:
        """The data have to be those that the stages in the run directory were begun with."""
        begun = self.ranks.on_first(partial(stages_with_data, self.experiment))
        data = {name: self.datamodule(self.experiment.stage(name).data) for name in begun}
        self.ranks.on_first(partial(adopt_data, self.experiment, data, changed))

    def _check(self, stage: PlannedStage) -> None:
        """Make a stage's module before any stage runs: what is wrong with it is said at once, not after hours.

        So is what does not fit its data, what no stage before it leaves, and what a callback that would edit it says.
        """
        if (self.experiment.run_dir / stage.name / DONE_MARKER).is_file():
            return
        with torch.random.fork_rng(devices=[]):
            try:
                made = stage.model()
                if is_overridden("check_data", made, Stage):
                    made.check_data(stage.data())  # type: ignore[arg-type]
                for check in (getattr(callback, "check_module", None) for callback in stage.callbacks()):
                    if check is not None:
                        check(made)
            except ValueError as error:
                raise ValueError(f"stages.{stage.name}: {error}") from error
        left = {kind for kinds in self.experiment.earlier(stage.name).values() for kind in kinds}
        for kind in made.needs:
            if kind not in left:
                raise ValueError(missing_need(stage.name, kind))

    def _run_stage(self, stage: PlannedStage) -> None:
        folder = self.experiment.run_dir / stage.name
        if self.ranks.on_first((folder / DONE_MARKER).is_file):
            self.say(f"{stage.name}: finished before, skipped")
            return
        self.ranks.on_first(partial(self._open, stage))
        self.say(f"{stage.name}: starts")
        record("stage_begins", stage=stage.name)
        clock, sent = Stopwatch(), TRAFFIC.seconds
        context = self._context(stage)
        self.ranks.on_first(partial(record_data, folder, context.data))
        # After the datamodule was made, which draws random numbers only in the first stage of each process.
        seed_everything(derive_seed(self.experiment.seed, stage.name), verbose=False)
        made = stage.model()
        results = made.run(context) if isinstance(made, PlainStage) else self._train(stage, made, context, clock)
        figures = {"seconds": clock.seconds, **results}
        if self.wandb is not None:
            self.ranks.on_first(partial(self.wandb.finish_stage, stage.name, figures, folder / BEST_CHECKPOINT))
        self.ranks.on_first(partial(mark_done, folder, figures))
        used = {"memory_mib": peak_memory(), "communication_seconds": TRAFFIC.seconds - sent}
        record("stage_ends", stage=stage.name, **used, figures=figures)
        for path in folder.glob("error*.txt"):
            path.unlink(missing_ok=True)
        self.say(f"{stage.name}: done in {clock.seconds:.1f} s")

    def _evaluate(self, unless_reported: bool = False) -> None:
        """Evaluate the models on all splits and write the report, once: test images are looked at after training."""
        run, data = self.result, self.datamodule()
        if not self.ranks.on_first(partial(is_evaluated, run)):
            self.say("evaluate: the circuits on all splits")
            record("evaluate")
            clock = Stopwatch()
            results = evaluate_run(run, data, self.ranks)
            self.ranks.on_first(partial(shutil.rmtree, run.dir / REPORT, ignore_errors=True))  # of other models
            self.ranks.on_first(partial(mark_done, run.dir / EVALUATE, {"seconds": clock.seconds, **results}))
        if not (unless_reported and self.ranks.on_first(partial(is_written, run))):
            self.ranks.on_first(partial(write_report, run, data, self.ranks.device))
            record("report")
            if self.wandb is not None:
                self.ranks.on_first(partial(self._log_report, self.wandb, data))

    def _log_report(self, wandb: WandbRun, data: Any) -> None:
        test = {f"test/{name}": value for name, value in summarize(self.result, data).get("test", {}).items()}
        stages = list(self.result.stage_figures())
        wandb.log_report(stages, test, *plain_table(self.result, data), self.result.dir / REPORT)

    def _open(self, stage: PlannedStage) -> None:
        # What was evaluated before this stage ran stays true if the stage leaves nothing, as those that only compare.
        if stage.kind.leaves:
            for folder in (EVALUATE, REPORT):
                shutil.rmtree(self.experiment.run_dir / folder, ignore_errors=True)
        record_stage(self.experiment, stage)

    def _keep_details(self, stage: PlannedStage, error: Exception) -> None:
        """Leave the traceback in the stage's folder: the command line prints the message of an error alone."""
        folder = self.experiment.run_dir / stage.name
        path = folder / ("error.txt" if self.ranks.is_first else f"error_rank{self.ranks.rank}.txt")
        if folder.is_dir():
            with suppress(OSError):  # a disk that is full, which may be what the error says
                write_atomically(path, traceback.format_exc())
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"(stage {stage.name}, details in {path})")

    def _context(self, stage: PlannedStage) -> StageContext:
        return StageContext(
            run_dir=self.experiment.run_dir,
            stage=stage.name,
            seed=self.experiment.seed,
            data=self.datamodule(stage.data),
            shared=self.experiment.shared,
            earlier=self.experiment.earlier(stage.name),
            device=self.ranks.device,
        )

    def _train(self, stage: PlannedStage, module: Stage, context: StageContext, clock: Stopwatch) -> dict[str, float]:
        if not isinstance(module, StageModule):
            raise ValueError(
                f"stage {stage.name!r}: a {type(module).__name__} is neither a StageModule nor a PlainStage"
            )
        module.begin_stage(context)
        if module.monitor is None:
            module.follow(context.data.unit)
        assert module.monitor is not None
        checkpoint = EpochCheckpoint(context.dir, module.monitor, module.monitor_mode)
        metrics = MetricsFile(context.dir / METRICS, lambda: clock.seconds)
        begun = self.ranks.on_first(partial(where_to_resume, checkpoint))
        self.ranks.on_first(partial(metrics.keep, begun.last_epoch, begun.step))
        if begun.path is not None:
            self.say(f"{stage.name}: {begun.said}")
            record("resume", stage=stage.name, file=begun.path.name, epoch=begun.last_epoch + 1, step=begun.step)
        noted = Noted(context.data.unit.name, context.data.protocol)
        steps = StepCheckpoint(context.dir, self.experiment.checkpoint_minutes)
        trainer = self._trainer(stage, module, (clock, checkpoint, steps), metrics, noted)
        try:
            trainer.fit(
                module,
                datamodule=None if is_overridden("train_dataloader", module) else context.data,
                ckpt_path=begun.path,
                weights_only=True,
            )
        except Stopped:
            raise
        except SystemExit as ended:
            # Lightning makes of an interruption an exit, without a word and with further interruptions ignored.
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from ended
        # Circuits are built anew for the best epoch: of the type that they were trained in.
        with trainer.precision_plugin.module_init_context() if module.em else nullcontext():
            return self.ranks.on_first(partial(self._finish, module, context, checkpoint))

    def _finish(self, module: StageModule, context: StageContext, checkpoint: EpochCheckpoint) -> dict[str, float]:
        load_best(module, checkpoint)
        module.to(self.ranks.device).eval()
        for metric in module.modules():
            if isinstance(metric, Metric):
                metric.distributed_available_fn = lambda: False  # the other ranks wait and would not answer
        return module.finish_stage(context)

    def _trainer(
        self,
        stage: PlannedStage,
        module: StageModule,
        own: tuple[Callback, Callback, Callback],
        metrics: MetricsFile,
        noted: Noted,
    ) -> Trainer:
        """The Trainer of a stage: what the config says, and what makes it resumable."""
        folder = metrics.path.parent
        arguments = {key: value for key, value in stage.trainer(folder).items() if value is not None}
        if module.em:
            module.batches_per_step = arguments.pop("accumulate_grad_batches", 1)
        callbacks = [EpochSeed(derive_seed(self.experiment.seed, stage.name)), *arguments.pop("callbacks", [])]
        bar = arguments.pop("enable_progress_bar", sys.stdout.isatty())
        if not any(isinstance(callback, AnyProgressBar) for callback in callbacks):
            callbacks.append(ProgressBar(noted) if bar else EpochLines(stage.name, metrics.clock, noted))
        if module.em and self.ranks.world_size > 1 and arguments.get("strategy", "auto") in ("auto", "ddp"):
            from lvd_lightning.strategies import EMStrategy

            arguments["strategy"] = EMStrategy()
        loggers = [metrics, *arguments.get("logger", [])]
        if self.wandb is not None and stage.wandb is not None:
            loggers.append(StageLogger(self.wandb, stage.name))
        defaults = {"num_sanity_val_steps": 0, "enable_model_summary": sys.stdout.isatty()}
        trainer = Trainer(
            **{**self.experiment.devices, **defaults, **arguments, "logger": loggers},
            callbacks=[
                own[0],
                RankAgreement(stage.name),
                MachineLog(stage.name),
                StillThere(folder),
                *callbacks,
                *own[1:],
            ],
            default_root_dir=folder,
            use_distributed_sampler=False,
            enable_progress_bar=any(isinstance(callback, AnyProgressBar) for callback in callbacks),
        )
        leave_signals_alone(trainer)
        return trainer


def _record_end(kind: Any, error: BaseException | None, details: Any) -> None:
    """How the work on a run ended."""
    if isinstance(error, Stopped):
        record("signal", signal=signal.Signals(error.signal).name)
    elif error is not None:
        record("error", kind=type(error).__name__, message=str(error)[:1000])
    else:
        record("end")


def leave_signals_alone(trainer: Trainer) -> None:
    """Signals are the process's, not the Trainer's (see `lvd_lightning.stopping`).

    Its own handlers save inside of a signal, broadcast there, which hangs unless all ranks got it, and end with the
    Trainer. With them goes a message in every batch that `StepCheckpoint` sends itself.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def load_best(module: StageModule, checkpoint: EpochCheckpoint) -> None:
    """Load the best epoch into the module; without one it keeps what it has, with a warning if it was trained."""
    if not checkpoint.best_path.is_file():
        if checkpoint.last_path.is_file():
            warnings.warn(
                f"no epoch logged a finite {checkpoint.monitor!r}: the last epoch is taken for the best", stacklevel=2
            )
        return
    try:
        content = torch.load(str(checkpoint.best_path), map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise unreadable(checkpoint.best_path, error) from error
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])


def mark_done(folder: Path, results: dict[str, Any]) -> None:
    """Write the marker that says that a folder is complete, with figures for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / DONE_MARKER, results, indent=2)


def _quieten_lightning() -> None:
    """Every stage makes a Trainer; what each says about the machine and about its settings is said once too often."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)
