"""The state of every stage after the newest committed step, rebuilt from pinned snapshots and committed gradients.

For export, by anybody who can reach the holders: everything used is checked against digests that the log pins. What a
late joiner does for one stage, done for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from shoal.protocol.codecs import decode
from shoal.protocol.events import Reason
from shoal.protocol.runlog import Chain
from shoal.protocol.transport import Refused
from shoal.swarm.pipeline.context import Context
from shoal.swarm.pipeline.server import have_blob
from shoal.swarm.pipeline.state import Apply, Have, Initialise, Load, Ready, load_program, next_action
from shoal.swarm.stage import StageProgram

Progress = Callable[[int, int, int], None]  # (stage, step, of step)


async def collect_states(
    context: Context, chain: Chain, build: Callable[[int], StageProgram], progress: Progress | None = None
) -> list[dict[str, Tensor]]:
    """`StageProgram.state()` of every stage at `chain.head.step`, by stage.

    Needs memory for one stage at a time. Raises Refused: NOT_FOUND when nobody gives a needed blob,
    MALFORMED or NOT_FINITE when what the log pins is no state.
    """
    states = []
    for stage in range(context.spec.shape.stages):
        states.append(await _collect_stage(context, chain, build, stage, progress))
    return states


async def _collect_stage(
    context: Context, chain: Chain, build: Callable[[int], StageProgram], stage: int, progress: Progress | None
) -> dict[str, Tensor]:
    head = chain.head
    donors = [*head.servers(stage), *(m.peer for m in head.members if m.stage != stage)]
    program: StageProgram | None = None
    have: Have | None = None
    while True:
        action = next_action(chain, stage, have, {}, context.blobs.digests())
        match action:
            case Initialise():
                program = await context.run_in_thread(build, stage)
                step = 0
            case Load(step=step, digest=digest):
                data = await _blob(context, digest, donors)
                program = await context.run_in_thread(load_program, build, stage, data)
            case Apply(step=step, gradient=digest, holders=holders, samples=samples) if program is not None:
                data = await _blob(context, digest, [*holders, *donors])
                gradient = decode(data, max_elements=program.numel)
                await context.run_in_thread(program.apply, gradient, samples)
            case Ready() if program is not None:
                return program.state()
            case _:
                raise AssertionError(f"no way to the state of stage {stage}: {action}")
        have = Have(stage, step, chain.commit_digest(step))
        if progress is not None:
            progress(stage, step, head.step)


async def _blob(context: Context, digest: str, donors: Sequence[str]) -> bytes:
    await have_blob(context, digest, [p for p in donors if p != context.me])
    data = await context.blobs.get(digest)
    if data is None:
        raise Refused(Reason.NOT_FOUND, digest)
    return data
