"""Trains a probabilistic circuit by latent variable distillation, from teacher to finetuned circuit.

One device, or all of one machine:
    python train.py fit --config photos
Two GPUs of one machine:
    python train.py fit --config lvd_imagenet32 --trainer.devices 2
Two machines with eight GPUs each, on each of them:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \
        train.py fit --config lvd_imagenet32 --trainer.devices 8 --trainer.num_nodes 2
SLURM, from a job with --nodes 2 --ntasks-per-node 8 (examples/slurm has scripts that queue themselves again):
    srun python train.py fit --config lvd_imagenet32 --trainer.devices 8 --trainer.num_nodes 2

Starting again continues; a second job on the same run is refused. SIGTERM and SIGUSR1 save and end with exit code 75.
One stage alone: --stage conditional. Another value: --shared.num_clusters 32, --stages.teacher.trainer.max_epochs 2.
An overlay: a second --config. What would run: --print_config.
Results are in runs/NAME/report; `python train.py test --run runs/photos` prints the figure on the test images again.
"""

import sys

from lvd_lightning.cli import main
from lvd_lightning.stopping import ignore_signals

if __name__ == "__main__":
    code = main()
    ignore_signals()  # the work is done, and the interpreter takes its time to end
    sys.exit(code)
