"""The planted faults, by the part of the library that they break: one for each invariant."""

from tests.faults.catalogue import cache, models, mosaic_gpu, mosaic_tpu, patterns, training, xla
from tests.faults.fault import Fault

CATALOGUE: dict[str, list[Fault]] = {
    "Patterns and schedules": patterns.FAULTS,
    "The op and XLA's backend": xla.FAULTS,
    "Hopper kernels": mosaic_gpu.FAULTS,
    "TPU kernels": mosaic_tpu.FAULTS,
    "Caches": cache.FAULTS,
    "Layers, models and checkpoints": models.FAULTS,
    "Training": training.FAULTS,
}
FAULTS = [fault for faults in CATALOGUE.values() for fault in faults]
