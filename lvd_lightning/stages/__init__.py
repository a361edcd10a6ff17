"""Stages of experiments, one file each; each is imported when it is first asked for."""

from lvd_lightning.lazy import lazy_names

_HOMES = {
    "EncoderTeacher": "encoder_teacher",
    "FlowBaseline": "flow_baseline",
    "FlowStudent": "flow_student",
    "FlowTeacher": "flow_teacher",
    "MAETeacher": "mae_teacher",
    "VQVAETeacher": "vqvae_teacher",
    "Latents": "latents",
    "ConditionalStudent": "conditional",
    "PriorStudent": "prior",
    "FinetuneStudent": "finetune",
    "PerceptualStudent": "perceptual",
    "CircuitBaseline": "baseline",
    "HMMStudent": "hmm",
    "HMMBaseline": "hmm_baseline",
    "NGramReference": "ngrams",
    "PlainStage": "stage",
    "Stage": "stage",
    "StageModule": "stage",
}

__all__ = [
    "CircuitBaseline",
    "ConditionalStudent",
    "EncoderTeacher",
    "FinetuneStudent",
    "FlowBaseline",
    "FlowStudent",
    "FlowTeacher",
    "HMMBaseline",
    "HMMStudent",
    "Latents",
    "MAETeacher",
    "NGramReference",
    "PerceptualStudent",
    "PlainStage",
    "PriorStudent",
    "Stage",
    "StageModule",
    "VQVAETeacher",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
