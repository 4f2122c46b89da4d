"""The network that a run compresses: the weights that were given or are trained first, what they score, and the dense control that the file may be measured against.

Not covered: what a stage is, and when it is made anew (`stages`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clipq_ray import identity, models, stages
from clipq_ray.evaluate import Evaluation
from clipq_ray.source import Source
from clipq_ray.stages import Run
from clipq_ray.states import WEIGHTS, put_state, read_state, write_state
from clipq_ray.storage import Store
from clipq_ray.work import CURVE, prepare_process


def inputs_of(source: Source) -> Mapping[str, Any]:
    """What decides the run of a network, apart from an ensemble that it may be in."""
    prepare_process(source.config.threads_per_worker)
    return identity.of_run(source, source.data(), given(source, [])[0])


def given(source: Source, notes: list[str]) -> tuple[dict[str, Tensor] | None, str]:
    """The state dict that the user gave (None: trained first) and where it is from; `notes` are added to."""
    origin = source.weights_origin()
    if origin == "train":
        return None, origin
    model = source.network()
    if origin not in ("random", "module"):
        state = models.read_weights(origin, source.architecture())
        notes += models.apply_weights(model, state, origin)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, origin


def baseline(
    run: Run, state: dict[str, Tensor] | None, origin: str, work: Store
) -> tuple[Store, dict[str, Evaluation | None]]:
    """Store the original's weights (trained first if there are none) and score them; stop near chance."""
    config = run.config
    if state is None:
        schedule = stages.schedule_of(config, config.baseline_epochs, config.baseline_learning_rate)
        store = stages.trained(run, "baseline", schedule, None, None, work)
    else:

        def make(store: Store, progress: Any) -> None:
            write_state(store, WEIGHTS, state)
            store.write(CURVE, json.dumps({"curve": [], "notes": []}).encode())

        store = run.stage("baseline", {"weights": models.weights_sha256(state)}, CURVE, make)
    model = run.source.network()
    put_state(model, read_state(store))
    scores = stages.scored_all(run, model)
    stages.refuse_bad_baseline(run, scores, origin)
    return store, scores


def control(run: Run, weights: Store, work: Store) -> Store:
    """The dense control: the schedule of the first round, and of all on the way to it, without the operator."""
    schedule = stages.schedule_of(run.config, stages.control_epochs(run.config), run.config.learning_rate)
    return stages.trained(run, "control", schedule, weights, None, work)


def dense(run: Run, weights: Store | None) -> dict[str, Evaluation | None]:
    """The scores of the dense control of these weights, by split; None where there is none."""
    if weights is None:
        return {"validation": None, "test": None}
    model = run.source.network()
    put_state(model, read_state(weights))
    return stages.scored_all(run, model)
