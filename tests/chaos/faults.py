"""The faults: what is done, for how long, and to which part, drawn from a seed before anything starts."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ingestor.store.connect import connect
from tests.chaos.world import Instance, World
from tests.disks import fill
from tests.proxy import Proxy

INTERVAL = 1.7
"""Seconds between the beginnings of two faults, in the mean."""


@dataclass(frozen=True)
class Fault:
    """One entry of the schedule: it lasts `seconds` (where it lasts), and the next one begins after `pause`.

    In some rounds the first instance is `alone`, so that nobody makes up for what it loses.
    """

    kind: str
    instance: int
    alone: bool
    seconds: float
    pause: float


async def stop_and_start(world: World, fault: Fault) -> None:
    await asyncio.to_thread(world.server.stop)
    await asyncio.sleep(fault.seconds)
    await world.server.start()


async def kill_server(world: World, fault: Fault) -> None:
    await asyncio.to_thread(world.server.kill)
    await asyncio.sleep(fault.seconds)
    await world.server.start()


async def pause_server(world: World, fault: Fault) -> None:
    world.server.pause()
    await asyncio.sleep(fault.seconds)
    world.server.resume()


async def terminate_connections(world: World, fault: Fault) -> None:
    await _execute(
        world,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ingestor' "
        "AND pid <> pg_backend_pid()",
    )


async def hold_back_writes(world: World, fault: Fault) -> None:
    await _execute(world, f"LOCK TABLE ingest.stream_sessions; SELECT pg_sleep({fault.seconds})")


async def fill_servers_disk(world: World, fault: Fault) -> None:
    assert world.disk is not None
    filler = await asyncio.to_thread(fill, world.disk)
    await asyncio.sleep(fault.seconds)
    filler.unlink()


async def _execute(world: World, statements: str) -> None:
    connection = await connect(world.url, application_name="chaos")
    try:
        await connection.execute(statements)
    finally:
        connection.terminate()


async def cut(wire: Proxy, fault: Fault) -> None:
    wire.cut()


async def cut_in_the_middle(wire: Proxy, fault: Fault) -> None:
    wire.cut_in_the_middle()
    await asyncio.sleep(0.5)


async def hold(wire: Proxy, fault: Fault) -> None:
    wire.hold()
    await asyncio.sleep(fault.seconds)
    wire.release()


async def hold_beyond_the_keepalive(wire: Proxy, fault: Fault) -> None:
    wire.hold()
    await asyncio.sleep(2 + fault.seconds)
    wire.cut()
    wire.release()


async def delay(wire: Proxy, fault: Fault) -> None:
    wire.delay = 0.15
    await asyncio.sleep(fault.seconds)
    wire.delay = 0.0


async def lose_answers(wire: Proxy, fault: Fault) -> None:
    wire.mutes_server = True
    await asyncio.sleep(min(fault.seconds, 0.5))
    wire.cut()
    wire.mutes_server = False


async def kill_daemon(instance: Instance, fault: Fault) -> None:
    await asyncio.to_thread(instance.daemon.kill)
    await asyncio.sleep(fault.seconds / 3)
    instance.daemon.start()
    await asyncio.sleep(1)


async def stop_daemon(instance: Instance, fault: Fault) -> None:
    status = await asyncio.to_thread(instance.daemon.stop)
    # A process that was only just started may not listen to signals yet; then it has nothing to lose either.
    assert status in {0, -signal.SIGTERM}, f"{instance.name} ended with {status}: {instance.daemon.tail()}"
    instance.daemon.start()
    await asyncio.sleep(1)


async def pause_daemon(instance: Instance, fault: Fault) -> None:
    instance.daemon.signal(signal.SIGSTOP)
    await asyncio.sleep(fault.seconds)
    instance.daemon.signal(signal.SIGCONT)


async def freeze_daemon(instance: Instance, fault: Fault) -> None:
    instance.daemon.signal(signal.SIGSTOP)
    await asyncio.sleep(3 + fault.seconds)  # longer than the keepalive
    instance.daemon.signal(signal.SIGCONT)


async def freeze_and_kill_daemon(instance: Instance, fault: Fault) -> None:
    """End it while it reads what came during its sleep."""
    await freeze_daemon(instance, fault)
    await asyncio.sleep(fault.seconds / 20)
    await kill_daemon(instance, fault)


ON_SERVER: dict[str, Callable[[World, Fault], Awaitable[None]]] = {
    "server stopped": stop_and_start,
    "server killed": kill_server,
    "server paused": pause_server,
    "server's connections terminated": terminate_connections,
    "server's writes held back": hold_back_writes,
    "server's disk full": fill_servers_disk,
}
ON_DATABASE_WIRE: dict[str, Callable[[Proxy, Fault], Awaitable[None]]] = {
    "database wire cut": cut,
    "database wire cut in a message": cut_in_the_middle,
    "database wire half-open": hold,
    "database wire delayed": delay,
    "database answers lost": lose_answers,
}
ON_FEED_WIRE: dict[str, Callable[[Proxy, Fault], Awaitable[None]]] = {
    "feed wire cut": cut,
    "feed wire cut in a frame": cut_in_the_middle,
    "feed wire half-open": hold_beyond_the_keepalive,
    "feed wire delayed": delay,
}
ON_PROCESS: dict[str, Callable[[Instance, Fault], Awaitable[None]]] = {
    "daemon killed": kill_daemon,
    "daemon stopped": stop_daemon,
    "daemon paused": pause_daemon,
    "daemon frozen": freeze_daemon,
    "daemon frozen, then killed": freeze_and_kill_daemon,
}
MUTE = "feed mute"
KINDS = [*ON_SERVER, *ON_DATABASE_WIRE, *ON_FEED_WIRE, *ON_PROCESS, MUTE]


def schedule(seed: int, seconds: float, *, without: set[str]) -> list[Fault]:
    """Draw faults for so long, each kind once in every round; the same seed gives the same."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    left = seconds
    alone = False
    while left > 0:
        alone = not alone
        kinds = [kind for kind in KINDS if kind not in without]
        chance.shuffle(kinds)
        for kind in kinds:
            instance = 0 if alone else chance.randrange(2)
            fault = Fault(kind, instance, alone, 0.3 + chance.random() * 2, chance.uniform(0.3, 1.7) * INTERVAL)
            left -= fault.pause
            faults.append(fault)
    return faults


async def strike(world: World, fault: Fault) -> None:
    """Do it, once nothing else is being done to the same thing."""
    instance = world.instances[fault.instance]
    if fault.kind in ON_SERVER:
        async with world.server_lock:
            await ON_SERVER[fault.kind](world, fault)
    elif fault.kind in ON_DATABASE_WIRE:
        async with instance.database_lock:
            await ON_DATABASE_WIRE[fault.kind](instance.database, fault)
    elif fault.kind in ON_FEED_WIRE:
        async with instance.feed_lock:
            await ON_FEED_WIRE[fault.kind](instance.feed, fault)
    elif fault.kind in ON_PROCESS:
        async with instance.process_lock:
            assert instance.daemon.is_running, f"{instance.name} has ended by itself: {instance.daemon.tail()}"
            await ON_PROCESS[fault.kind](instance, fault)
    else:
        for account in world.accounts()[instance.name][-1:]:
            world.simulator.mute(account)
