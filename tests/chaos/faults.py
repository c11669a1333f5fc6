"""The faults: kind, duration and target, drawn from a seed before anything starts."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ingestor.dial import STAGGER
from ingestor.store.connect import connect
from tests.addresses import swallowing
from tests.chaos import process_faults, readers
from tests.chaos.backup import Backup
from tests.chaos.world import FIRST_ADDRESS, WRITER, Instance, World
from tests.disks import fill
from tests.proxy import Proxy

INTERVAL = 1.4
"""Approximate seconds from one fault to the next: eight minutes for two editions hold six rounds on each."""


_RECONNECT = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{WRITER}'"
LIMIT_STATEMENTS = f"""
CREATE OR REPLACE FUNCTION market.slow_down() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_sleep(0.001); RETURN new; END $$;
CREATE TRIGGER slow_down BEFORE INSERT ON market.ticks FOR EACH ROW EXECUTE FUNCTION market.slow_down();
ALTER ROLE {WRITER} SET statement_timeout = '150ms';
{_RECONNECT}
"""
LIFT_LIMIT = f"""
DROP TRIGGER IF EXISTS slow_down ON market.ticks;
ALTER ROLE {WRITER} RESET statement_timeout;
{_RECONNECT}
"""


@dataclass(frozen=True)
class Fault:
    """One entry of the schedule. It lasts `seconds` (if it has a duration); the next one begins after `pause`.

    In some rounds the first instance is `alone`, so that no other instance covers its losses. Random choices within the
    fault follow `seed`.
    """

    kind: str
    instance: int
    alone: bool
    seconds: float
    pause: float
    seed: int


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


async def limit_statements(world: World, fault: Fault) -> None:
    """Slow each row down to a millisecond, and limit a statement to 150 of them."""
    await _execute(world, LIMIT_STATEMENTS)
    await asyncio.sleep(1 + fault.seconds)
    await _execute(world, LIFT_LIMIT)


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


async def restore(world: World, fault: Fault) -> None:
    """Restore the database to its state some seconds ago, while the daemons write."""
    async with world.backup_lock:
        async with world.server_lock:
            backup = await Backup.take(world.url)
        await asyncio.sleep(fault.seconds)
        async with world.server_lock:
            await backup.restore(world.url)


async def restore_around_a_stall(world: World, fault: Fault) -> None:
    """Lose the beginning of a session in the database, before its end by a stall is written."""
    instance = world.instances[fault.instance]
    async with world.backup_lock, instance.feed_lock, instance.database_lock:
        async with world.server_lock:
            backup = await Backup.take(world.url)
        instance.feed.cut()
        await asyncio.sleep(2.7 + fault.seconds / 3)  # a new session begins, and more than a margin of it is committed
        instance.database.refuses = True
        instance.database.cut()
        await asyncio.sleep(0.3)  # the rest of the session waits
        muted = world.mute(instance)
        await world.ended(muted, within=5)
        async with world.server_lock:
            await backup.restore(world.url)
        instance.database.refuses = False


async def mute(world: World, fault: Fault) -> None:
    world.mute(world.instances[fault.instance])


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


async def let_first_address_die(wire: Proxy, fault: Fault) -> None:
    """Cut the connection, and let the first of the two addresses of `localhost` swallow packets meanwhile."""
    with swallowing(FIRST_ADDRESS, wire.port):
        wire.cut()
        await asyncio.sleep(fault.seconds + STAGGER)


async def narrow(wire: Proxy, fault: Fault) -> None:
    wire.bytes_per_second = 20_000
    await asyncio.sleep(1 + 2 * fault.seconds)
    wire.bytes_per_second = None


async def limit_bytes(wire: Proxy, fault: Fault) -> None:
    wire.most_unanswered = 2_000
    await asyncio.sleep(1 + fault.seconds)
    wire.most_unanswered = None


async def lose_answers(wire: Proxy, fault: Fault) -> None:
    wire.mutes_server = True
    await asyncio.sleep(min(fault.seconds, 0.5))
    wire.cut()
    wire.mutes_server = False


async def kill_pooler(world: World, fault: Fault) -> None:
    assert world.pooler is not None
    world.pooler.kill()
    await asyncio.sleep(fault.seconds)
    await asyncio.to_thread(world.pooler.start)


async def kill_relay(world: World, fault: Fault) -> None:
    await readers.kill_relay(world.readers.relays[fault.seed % 2], fault.seconds)


async def pause_relay(world: World, fault: Fault) -> None:
    relay = world.readers.relays[fault.seed % 2]
    if relay.is_running:
        relay.signal(signal.SIGSTOP)
        await asyncio.sleep(fault.seconds)
        relay.signal(signal.SIGCONT)


DISK_FULL = "server's disk full"
POOLER_KILLED = "pooler killed"
ON_SERVER: dict[str, Callable[[World, Fault], Awaitable[None]]] = {
    "server stopped": stop_and_start,
    "server killed": kill_server,
    "server paused": pause_server,
    "server's connections terminated": terminate_connections,
    "server's writes held back": hold_back_writes,
    "server's statements limited": limit_statements,
    DISK_FULL: fill_servers_disk,
}
ON_DATABASE_WIRE: dict[str, Callable[[Proxy, Fault], Awaitable[None]]] = {
    "database wire cut": cut,
    "database wire cut in a message": cut_in_the_middle,
    "database wire half-open": hold,
    "database wire delayed": delay,
    "database wire narrow": narrow,
    "database wire limited in bytes": limit_bytes,
    "database answers lost": lose_answers,
    "database's first address dead": let_first_address_die,
}
ON_FEED_WIRE: dict[str, Callable[[Proxy, Fault], Awaitable[None]]] = {
    "feed wire cut": cut,
    "feed wire cut in a frame": cut_in_the_middle,
    "feed wire half-open": hold_beyond_the_keepalive,
    "feed wire delayed": delay,
    "feed's first address dead": let_first_address_die,
}
ON_PROCESS: dict[str, Callable[[Instance, float, random.Random], Awaitable[None]]] = {
    "daemon killed": process_faults.kill,
    "daemon stopped": process_faults.stop,
    "daemon sent SIGHUP": process_faults.send_sighup,
    "daemon paused": process_faults.pause,
    "daemon frozen": process_faults.freeze,
    "daemon frozen, then killed": process_faults.freeze_and_kill,
    "daemon's log not read": process_faults.leave_log_unread,
    "daemon's clock wrong": process_faults.set_clock_wrong,
    "bits flipped in the spool": process_faults.flip_bits,
    "page requested and not read": process_faults.ask_and_never_read,
}
ON_POOLER: dict[str, Callable[[World, Fault], Awaitable[None]]] = {POOLER_KILLED: kill_pooler}
ON_RELAY: dict[str, Callable[[World, Fault], Awaitable[None]]] = {
    "relay killed": kill_relay,
    "relay paused": pause_relay,
}
ON_WORLD: dict[str, Callable[[World, Fault], Awaitable[None]]] = {
    "database restored": restore,
    "database restored around a stall": restore_around_a_stall,
    "feed mute": mute,
}
"""Faults that take their locks themselves."""

KINDS = [*ON_SERVER, *ON_POOLER, *ON_DATABASE_WIRE, *ON_FEED_WIRE, *ON_PROCESS, *ON_RELAY, *ON_WORLD]


def schedule(seed: int, seconds: float, *, without: set[str]) -> list[Fault]:
    """Draw faults for so many seconds, each kind once in every round; the same seed gives the same faults."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    kinds = [kind for kind in KINDS if kind not in without]
    rounds = max(1, round(seconds / len(kinds) / INTERVAL))
    mean = seconds / rounds / len(kinds)
    for number in range(rounds):
        alone = number % 2 == 0
        chance.shuffle(kinds)
        for kind in kinds:
            instance = 0 if alone else chance.randrange(2)
            lasts, pause = 0.3 + chance.random() * 2, chance.uniform(0.3, 1.7) * mean
            faults.append(Fault(kind, instance, alone, lasts, pause, chance.getrandbits(32)))
    return faults


async def run_fault(world: World, fault: Fault) -> None:
    """Run a fault once no other fault has the same target."""
    instance = world.instances[fault.instance]
    if fault.kind in ON_SERVER:
        async with world.server_lock:
            await ON_SERVER[fault.kind](world, fault)
    elif fault.kind in ON_POOLER:
        async with world.pooler_lock:
            await ON_POOLER[fault.kind](world, fault)
    elif fault.kind in ON_RELAY:
        async with world.relay_lock:
            await ON_RELAY[fault.kind](world, fault)
    elif fault.kind in ON_DATABASE_WIRE:
        async with instance.database_lock:
            await ON_DATABASE_WIRE[fault.kind](instance.database, fault)
    elif fault.kind in ON_FEED_WIRE:
        async with instance.feed_lock:
            await ON_FEED_WIRE[fault.kind](instance.feed, fault)
    elif fault.kind in ON_PROCESS:
        async with instance.process_lock:
            assert instance.daemon.is_running, f"{instance.name} ended unexpectedly: {instance.daemon.tail()}"
            await ON_PROCESS[fault.kind](instance, fault.seconds, random.Random(fault.seed))
    else:
        await ON_WORLD[fault.kind](world, fault)
