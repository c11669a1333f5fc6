"""The faults of the cluster. Each returns once what it stopped may run again; the harness waits until it does."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.cluster.world import World
from tests.nats_servers import api, connected
from tests.proxy import Proxy

LAG_SECONDS = 3.0
"""Time for which a standby receives nothing before it is promoted."""

NOTICE_SECONDS = 3.0
"""Time after which Patroni has noticed that its server is dead."""

PARTITION_SECONDS = 5.0, 12.0
STREAM = "ingestor"

LOSES_COMMITS = "lagging standby promoted"
LOSES_MEMORY = "recorder killed"
"""Faults that may lose ticks inside declared gaps: the first one only without the replicated buffer."""

Fault = Callable[[World, random.Random], Awaitable[None]]


async def switch_over(world: World, chance: random.Random) -> None:
    await world.cluster.switch_over()


async def kill_postgres(world: World, chance: random.Random) -> None:
    await (await world.cluster.primary()).kill_postgres()
    await asyncio.sleep(NOTICE_SECONDS)


async def kill_machine(world: World, chance: random.Random) -> None:
    """Kill the primary's machine; it comes back as a standby."""
    node = await world.cluster.primary()
    await node.die()
    await world.cluster.promoted(world.cluster.other(node))
    node.part.start()


async def freeze_machine(world: World, chance: random.Random) -> None:
    """Freeze the primary's machine until the other one leads: then the old one believes that it still does."""
    node = await world.cluster.primary()
    node.freeze()
    try:
        await world.cluster.promoted(world.cluster.other(node))
        await asyncio.sleep(chance.uniform(0, 3))
    finally:
        node.thaw()


async def kill_standby(world: World, chance: random.Random) -> None:
    node = world.cluster.other(await world.cluster.primary())
    await node.die()
    await asyncio.sleep(chance.uniform(1, 5))
    node.part.start()


async def promote_with_lag(world: World, chance: random.Random) -> None:
    """Let an asynchronous standby lag, then kill the primary's machine: what the standby lacks is lost."""
    cluster = world.cluster
    await cluster.configure(synchronous_mode=False)
    await cluster.whole()
    node = await cluster.primary()
    node.cut_replication()
    try:
        await asyncio.sleep(LAG_SECONDS)
        await node.die()
    finally:
        node.allow_replication()
    await cluster.promoted(cluster.other(node))
    node.part.start()
    await cluster.configure(synchronous_mode=True)


async def restart_etcd(world: World, chance: random.Random) -> None:
    world.cluster.etcd.kill()
    await asyncio.sleep(chance.uniform(0.5, 3))
    world.cluster.etcd.start()


async def kill_recorder(world: World, chance: random.Random) -> None:
    await asyncio.to_thread(world.recorder.kill)
    world.recorder.start()
    await world.simulator.wait_connected()


async def kill_writer(world: World, chance: random.Random) -> None:
    """Kill the active writer, which is one of the two."""
    for writer in world.writers:
        await asyncio.to_thread(writer.kill)
        await asyncio.sleep(chance.uniform(0, 2))
        writer.start()
        await writer.page()


async def kill_leader(world: World, chance: random.Random) -> None:
    assert world.nats is not None
    server = await world.nats.leader()
    server.kill()
    await asyncio.sleep(chance.uniform(1, 5))
    server.start()


async def kill_follower(world: World, chance: random.Random) -> None:
    assert world.nats is not None
    leader = await world.nats.leader()
    server = chance.choice([each for each in world.nats.servers if each is not leader])
    server.kill()
    await asyncio.sleep(chance.uniform(1, 5))
    server.start()


async def wipe_node(world: World, chance: random.Random) -> None:
    assert world.nats is not None
    server = chance.choice(world.nats.servers)
    server.kill()
    server.wipe()
    await asyncio.sleep(chance.uniform(0, 2))
    server.start()


async def delete_messages(world: World, chance: random.Random) -> None:
    """Delete acknowledged messages that no writer has read: both writers are killed, since a frozen one reads ahead."""
    assert world.nats is not None
    for writer in world.writers:
        await asyncio.to_thread(writer.kill)
    await asyncio.sleep(1)
    async with connected(world.nats) as client:
        newest = (await api(client, f"STREAM.INFO.{STREAM}"))["state"]["last_seq"]
        for sequence in chance.sample(range(max(1, newest - 9), newest + 1), 3):
            with contextlib.suppress(AssertionError):  # it may be gone already
                await api(client, f"STREAM.MSG.DELETE.{STREAM}", {"seq": sequence, "no_erase": True})
    for writer in world.writers:
        writer.start()
        await writer.page()


async def _partition(wires: list[Proxy], chance: random.Random) -> None:
    """Cut a process off from NATS: half of the time its connections stay half-open."""
    if chance.random() < 0.5:
        for wire in wires:
            wire.hold()
    else:
        for wire in wires:
            wire.refuses = True
            wire.cut()
    try:
        await asyncio.sleep(chance.uniform(*PARTITION_SECONDS))
    finally:
        for wire in wires:
            wire.release()
            wire.refuses = False


async def cut_recorder_off(world: World, chance: random.Random) -> None:
    await _partition(world.recorder_wires, chance)


async def cut_writer_off(world: World, chance: random.Random) -> None:
    """Cut off one writer, or both."""
    wires = chance.choice([*world.writer_wires, [wire for each in world.writer_wires for wire in each]])
    await _partition(wires, chance)


ON_DATABASE: dict[str, Fault] = {
    "switchover": switch_over,
    "postgres killed": kill_postgres,
    "primary's machine dead": kill_machine,
    "primary's machine frozen": freeze_machine,
    "standby's machine dead": kill_standby,
    LOSES_COMMITS: promote_with_lag,
    "etcd restarted": restart_etcd,
}
ON_RECORDER: dict[str, Fault] = {LOSES_MEMORY: kill_recorder}
ON_BUFFER: dict[str, Fault] = {
    "NATS leader killed": kill_leader,
    "NATS follower killed": kill_follower,
    "NATS node wiped": wipe_node,
    "messages deleted": delete_messages,
    "writers killed": kill_writer,
    "recorder cut off from NATS": cut_recorder_off,
    "writer cut off from NATS": cut_writer_off,
}
KINDS = ON_DATABASE | ON_RECORDER | ON_BUFFER


@dataclass(frozen=True)
class Entry:
    """One fault of the schedule."""

    kind: str
    seed: int


def schedule(seed: int, count: int, kinds: list[str]) -> list[Entry]:
    """Draw faults, each kind once in every round; the same seed gives the same faults."""
    chance = random.Random(seed)
    entries: list[Entry] = []
    while len(entries) < count:
        entries += [Entry(kind, chance.getrandbits(32)) for kind in chance.sample(kinds, len(kinds))]
    return entries[:count]
