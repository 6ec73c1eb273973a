"""Looking into a model's memories: what they did with a text, what they hold, what they give back.

Everything works on models of any variant and on batches; a model without memories has zero of
them. A *memory* is one `NeuralMemory`; they are numbered from 0 in the order of the blocks.
"""

from titans.inspect.observation import Observation, observe, watch
from titans.inspect.probes import Probe, Recall, probe, recall, recall_curve
from titans.inspect.rereading import reach, replay, without_writing
from titans.inspect.steps import Step, explain
from titans.inspect.weights import Memory, distance, memories, momentum_norm, moved
from titans.inspect.writes import Write, Written, writes

__all__ = [
    "Memory",
    "Observation",
    "Probe",
    "Recall",
    "Step",
    "Write",
    "Written",
    "distance",
    "explain",
    "memories",
    "momentum_norm",
    "moved",
    "observe",
    "probe",
    "reach",
    "recall",
    "recall_curve",
    "replay",
    "watch",
    "without_writing",
    "writes",
]
