"""From a manifest to the fixed numbers of a pipeline run."""

from __future__ import annotations

from shoal.protocol.manifest import Manifest
from shoal.swarm.pipeline.context import Spec
from shoal.swarm.pipeline.roles import Shape


def spec_of(manifest: Manifest, coordinator: str) -> Spec:
    return Spec(
        run=manifest.run_id,
        seed=manifest.seed,
        shape=Shape(
            stages=manifest.model.stages,
            feeders=manifest.participation.feeders,
            committee=manifest.participation.committee,
            coordinator=coordinator,
            max_peers=manifest.limits.max_peers,
        ),
        microbatches=manifest.batch.samples // manifest.batch.microbatch,
        microbatch_samples=manifest.batch.microbatch,
        rounds=manifest.schedule.rounds,
        snapshot_every=manifest.schedule.snapshot_every,
        servers_per_stage=manifest.participation.servers_per_stage,
        activation_codec=manifest.codec.activations,
        gradient_codec=manifest.codec.gradients,
        max_body_bytes=manifest.limits.max_message_mib * 1024 * 1024,
    )
