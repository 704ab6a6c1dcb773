"""Tensors and JSON state -> a run directory that survives crashes, full disks and second processes; and back.

    runs/chat/
      recipe.yaml  manifest.json  metrics.jsonl        what ran, on what, and how it went
      checkpoints/step-000120/{*.safetensors, state.json, manifest.json}
      adapter/ or model/                               the result

`files.py` writes durably, `state.py` flattens what a checkpoint holds, `step.py` is one checkpoint, `manifest.py` what
a run says about itself, `run.py` its directory. Files are safetensors and JSON, never pickle; nothing is loaded whose
sha256 does not match.
"""

from tuner.checkpoint.files import MANIFEST, check_space, file_entries, publish_directory
from tuner.checkpoint.manifest import differences, read_manifest, redacted
from tuner.checkpoint.run import METRICS, RECIPE, RunDir, check_output, lock
from tuner.checkpoint.state import flatten_state, rng_state, set_rng_state, unflatten_state
from tuner.checkpoint.step import Checkpoint, check_result, damage

__all__ = [
    "MANIFEST",
    "METRICS",
    "RECIPE",
    "Checkpoint",
    "RunDir",
    "check_output",
    "check_result",
    "check_space",
    "damage",
    "differences",
    "file_entries",
    "flatten_state",
    "lock",
    "publish_directory",
    "read_manifest",
    "redacted",
    "rng_state",
    "set_rng_state",
    "unflatten_state",
]
