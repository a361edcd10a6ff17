"""What stages share that train one model by both rules of EM, to compare with."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

from typing_extensions import override

from lvd_lightning.context import StageContext
from lvd_lightning.files import write_json
from lvd_lightning.stages.em_student import Rule
from lvd_lightning.stages.stage import StageModule

__all__ = ["RULES", "RuleComparison"]

RULES: tuple[Rule, ...] = get_args(Rule)[::-1]


class RuleComparison(StageModule):
    """A stage that keeps, of each rule, the seconds that it took and the score of its best epoch, through resuming.

    seconds: by rule, in `spent.json` after every epoch: the checkpoint of the best one may hold those of an earlier.
    best: the validation likelihood of each rule's best epoch.
    """

    em: ClassVar[bool] = True
    seconds: dict[Rule, float]
    best: dict[Rule, float]
    _context: StageContext

    @override
    def on_train_epoch_end(self) -> None:
        if self.trainer.is_global_zero:
            write_json(self._context.dir / "spent.json", self.seconds)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["baseline"] = {"seconds": dict(self.seconds), "best": dict(self.best)}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds = dict(checkpoint["baseline"]["seconds"])
        self.best = dict(checkpoint["baseline"]["best"])
