"""The server: overhead, throughput, the time of an edit, a load with edits that come and go, and kills.

Every figure is taken through HTTP from a server in a process of its own, and beside ``generate`` in this process or the
bare model through the same server. ``--only`` runs some of the parts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from _common import facts, load, machine, number, parser, ratio

from emendo.data.schema import Record
from emendo.edits import applied_to_rows
from emendo.ledger.workspace import Workspace
from emendo.models.lm import LM

OFF: dict[str, Any] = {"edits": "off"}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=5)
    made.add_argument("--only", nargs="+", choices=RUN, default=list(RUN))
    made.add_argument("--requests", type=int, default=1000, help="of the load")
    made.add_argument("--clients", type=int, default=16)
    made.add_argument("--edits", type=int, default=12, help="edits that are active in the load")
    made.add_argument("--tokens", type=int, default=16, help="tokens of an answer")
    made.add_argument("--kills", type=int, default=10)
    made.add_argument("--editor", default=None, help="as emendo serve takes it")
    options = made.parse_args(arguments)
    machine(options)
    with tempfile.TemporaryDirectory() as temporary:
        for part in options.only:
            os.environ["EMENDO_HOME"] = f"{temporary}/home-{part}"
            print(f"\n### {part}\n", flush=True)
            own = argparse.Namespace(
                **vars(options) | {"model": without_ledger(options.model, temporary, part)}
            )
            RUN[part](own, Path(temporary) / part)


def without_ledger(model: str, temporary: str, part: str) -> str:
    """The model; a folder, which names its one ledger, as a folder of links that has none."""
    if not Path(model).is_dir():
        return model
    folder = Path(temporary) / f"model-{part}"
    folder.mkdir()
    for file in Path(model).resolve().iterdir():
        if file.name != "emendo-ledger":
            (folder / file.name).symlink_to(file)
    return str(folder)


# ------------------------------------------------------------------------------------------------- server


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    @property
    def cpu(self) -> float:
        """Processor seconds that it has taken."""
        numbers = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(options: argparse.Namespace, ledger: Path) -> Iterator[Server]:
    """Start a server, wait until it is ready, and stop it in the end."""
    command = [sys.executable, "-m", "emendo", "serve", options.model, "--port", "0", "--ledger", str(ledger)]
    command += ["--name", "model", "--dtype", options.dtype, "--edits-per-minute", "1000000"]
    command += ["--editor", options.editor] if options.editor else []
    errors = ledger.with_suffix(".log")
    errors.parent.mkdir(parents=True, exist_ok=True)
    with errors.open("w") as log:
        env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        process = subprocess.Popen(command, stderr=log, text=True, env=env)
    try:
        while not (found := re.search(r"http://\S+?:\d+", errors.read_text())):
            if process.poll() is not None:
                raise SystemExit(f"The server ended: {errors.read_text()}")
            time.sleep(0.05)
        while True:
            try:
                httpx2.get(f"{found[0]}/health", trust_env=False).raise_for_status()
                break
            except httpx2.HTTPError:
                time.sleep(0.05)
        yield Server(process, found[0])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@asynccontextmanager
async def client(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=server.url, timeout=600, trust_env=False) as opened:
        yield opened


async def ask(http: httpx2.AsyncClient, prompt: str | list[str], tokens: int, **body: Any) -> dict[str, Any]:
    values = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0} | body
    reply = await http.post("/v1/completions", json=values)
    reply.raise_for_status()
    found: dict[str, Any] = reply.json()
    return found


async def add(http: httpx2.AsyncClient, fact: Record) -> int:
    body = {"prompt": fact.prompt, "target": fact.target, "force": True}
    reply = await http.post("/v1/edits", json=body)
    reply.raise_for_status()
    return int(reply.json()["id"])


# -------------------------------------------------------------------------------------------------- parts


def overhead(options: argparse.Namespace, ledger: Path) -> None:
    """The server against ``generate`` in this process, interleaved; both in wall and in processor seconds."""
    lm = load(options)
    prompts = [fact.prompt for fact in facts(options, 8)]
    print(
        "| prompts | generate, s | server, s | wall, ratio | processor, ratio |\n| --- | --- | --- | --- | --- |"
    )

    async def run(server: Server) -> None:
        async with client(server) as http:
            for count in (1, 8):
                own: list[tuple[float, float]] = []
                other: list[tuple[float, float]] = []
                for turn in range(options.rounds + 1):
                    wall, cpu = time.perf_counter(), time.process_time()
                    lm.generate(prompts[:count], options.tokens)
                    one = (time.perf_counter() - wall, time.process_time() - cpu)
                    wall, cpu = time.perf_counter(), server.cpu
                    await ask(http, prompts[:count], options.tokens, **OFF)
                    two = (time.perf_counter() - wall, server.cpu - cpu)
                    if turn:
                        own.append(one)
                        other.append(two)
                times = [[each[i] for each in runs] for i in (0, 1) for runs in (other, own)]
                shown = [number(statistics.median(each)) for each in (times[1], times[0])]
                print(
                    f"| {count} | {' | '.join(shown)} | {ratio(*times[:2])} | {ratio(*times[2:])} |",
                    flush=True,
                )

    with served(options, ledger) as server:
        asyncio.run(run(server))


def throughput(options: argparse.Namespace, ledger: Path) -> None:
    """Tokens a second with one client and with many; every third request has an edit."""
    print("| clients | tokens a second | against one client |\n| --- | --- | --- |")

    async def run(server: Server) -> None:
        async with client(server) as http:
            known = facts(options, 64)
            for fact in known[:8]:
                await add(http, fact)
            rates: dict[int, list[float]] = {1: [], options.clients: []}
            for _ in range(options.rounds):
                for count, own in rates.items():
                    each = max(2, 2 * options.clients // count // 4)
                    start = time.perf_counter()
                    done = await asyncio.gather(
                        *(chain(http, known, options, seed, each) for seed in range(count))
                    )
                    own.append(sum(done) / (time.perf_counter() - start))
            for count, own in rates.items():
                shown = ratio(own, rates[1]) if count > 1 else 1
                print(f"| {count} | {number(statistics.median(own))} | {shown} |", flush=True)

    with served(options, ledger) as server:
        asyncio.run(run(server))


async def chain(
    http: httpx2.AsyncClient, known: Sequence[Record], options: argparse.Namespace, seed: int, count: int
) -> int:
    """One client's requests, one after the other; returns the number of tokens."""
    tokens = 0
    for i in range(count):
        at = (seed + i) % 8 if i % 3 == 0 else 8 + (seed * 7 + i) % 56
        found = await ask(http, known[at].prompt, options.tokens)
        tokens += found["usage"]["completion_tokens"]
    return tokens


def edit(options: argparse.Namespace, ledger: Path) -> None:
    """Seconds from an edit's request to the first answer with it, alone and while four clients ask."""
    print("| | edit, s | edit and first answer, s |\n| --- | --- | --- |")

    async def measured(http: httpx2.AsyncClient, known: Sequence[Record]) -> list[tuple[float, float]]:
        times = []
        for fact in known:
            start = time.perf_counter()
            id = await add(http, fact)
            made = time.perf_counter() - start
            found = await ask(http, fact.prompt, 4)
            times.append((made, time.perf_counter() - start))
            assert [each["id"] for each in found["emendo"]["edits"]] == [id], found
        return times

    async def run(server: Server) -> None:
        async with client(server) as http:
            known = facts(options, 2 * options.rounds + 60)
            first = await measured(http, known[:1])
            alone = await measured(http, known[1 : options.rounds + 1])
            others = [
                asyncio.create_task(chain(http, known[-60:], options, seed, 10**9)) for seed in range(4)
            ]
            busy = await measured(http, known[options.rounds + 1 : 2 * options.rounds + 1])
            for task in others:
                task.cancel()
            for name, times in (
                ("first after the start", first),
                ("alone", alone),
                ("four clients ask", busy),
            ):
                shown = [number(statistics.median(each)) for each in zip(*times, strict=True)]
                print(f"| {name} | {' | '.join(shown)} |", flush=True)

    with served(options, ledger) as server:
        asyncio.run(run(server))


@dataclass
class Answered:
    """An answer of the load."""

    prompt: str
    text: str
    edits: tuple[int, ...]
    operation: int
    seconds: float


def many_requests(options: argparse.Namespace, ledger: Path) -> None:
    """Requests of many clients, a third of them under edits, which come and go; every answer is checked."""
    known = facts(options, options.edits + 60)
    numbers: dict[int, str] = {}  # edit -> the prompt that it is for
    asked = iter(range(options.requests))

    async def one_client(http: httpx2.AsyncClient, found: list[Answered], **body: Any) -> None:
        for i in asked:
            fact = known[i % options.edits if i % 3 == 0 else options.edits + i % 60]
            start = time.perf_counter()
            reply = await ask(http, fact.prompt, options.tokens, **body)
            edits = tuple(each["id"] for each in reply["emendo"]["edits"])
            seconds = time.perf_counter() - start
            text, operation = reply["choices"][0]["text"], reply["emendo"]["operation"]
            found.append(Answered(fact.prompt, text, edits, operation, seconds))

    async def one_editor(http: httpx2.AsyncClient) -> None:
        while True:
            id = random.choice(list(numbers))
            await http.delete(f"/v1/edits/{id}")
            fact = next(fact for fact in known if fact.prompt == numbers[id])
            del numbers[id]
            numbers[await add(http, fact)] = fact.prompt
            every.update(numbers)

    async def run(server: Server) -> tuple[list[Answered], list[Answered]]:
        nonlocal asked
        async with client(server) as http:
            for fact in known[: options.edits]:
                numbers[await add(http, fact)] = fact.prompt
            every.update(numbers)
            bare: list[Answered] = []
            await asyncio.gather(*(one_client(http, bare, **OFF) for _ in range(options.clients)))
            asked = iter(range(options.requests))
            editing = asyncio.create_task(one_editor(http))
            routed: list[Answered] = []
            await asyncio.gather(*(one_client(http, routed) for _ in range(options.clients)))
            editing.cancel()
            return bare, routed

    every: dict[int, str] = {}
    with served(options, ledger) as server:
        bare, routed = asyncio.run(run(server))
    print("| | requests | under an edit | p50, s | p95, s |\n| --- | --- | --- | --- | --- |")
    for name, found in (("bare model", bare), ("edits come and go", routed)):
        times = sorted(each.seconds for each in found)
        edited = sum(bool(each.edits) for each in found)
        marks = [number(times[int(share * (len(times) - 1))]) for share in (0.5, 0.95)]
        print(f"| {name} | {len(found)} | {edited} | {' | '.join(marks)} |")
    print(f"\n{len(every)} edits were made. Status other than 200: 0.")
    check(options, ledger, bare, routed, every)


def check(
    options: argparse.Namespace,
    ledger: Path,
    bare: Sequence[Answered],
    routed: Sequence[Answered],
    every: dict[int, str],
) -> None:
    """Compare the edits in force, and the answer, with those that each prompt has alone after the same operation."""
    lm = load(options)
    work = Workspace.open(lm, ledger)
    prompts = sorted({each.prompt for each in routed})
    queries = dict(zip(prompts, work.memory().router.read(lm, prompts), strict=True))
    memories = {operation: work.memory(operation) for operation in {each.operation for each in routed}}
    wrong = sum(bool(each.edits) for each in bare)
    for each in routed:
        choice = memories[each.operation].choose(queries[each.prompt])
        wrong += each.edits != (() if choice.edit is None else (choice.edit,))
    found = [*bare, *routed]
    want = {
        key: alone(lm, work, *key, options.tokens) for key in {(each.prompt, each.edits) for each in found}
    }
    other = sum(each.text != want[each.prompt, each.edits] for each in found)
    near = {each.prompt for each in routed if any(every[id] != each.prompt for id in each.edits)}
    print(
        f"Answers under an edit that the prompt does not have alone: {wrong}; with another text than alone: {other} of "
        f"{len(found)}. Prompts about another fact for which the router takes an edit, alone as well: {sorted(near)}."
    )


def alone(lm: LM, work: Workspace, prompt: str, edits: tuple[int, ...], tokens: int) -> str:
    with applied_to_rows(lm, [[work.edit(id) for id in edits]]) as edited:
        text: str = edited.generate(prompt, tokens)
    return text


def kill(options: argparse.Namespace, ledger: Path) -> None:
    """Kill the server at random moments while edits are made; what it acknowledged must be there afterwards.

    Each server acknowledges three to five edits, and is killed at any moment of the next ones.
    """
    known, order = facts(options, 200), random.Random(0)
    kept, gone, made = dict[int, str](), set[int](), 0

    async def edit_on(server: Server) -> None:
        nonlocal made
        async with client(server) as http:
            with suppress(httpx2.HTTPError):  # it was killed
                while True:
                    fact = known[made % len(known)]
                    made += 1
                    kept[await add(http, fact)] = fact.prompt
                    if order.random() < 0.2:
                        id = order.choice(list(kept))
                        kept.pop(id)  # whether the answer arrives or not, it may be gone
                        (await http.delete(f"/v1/edits/{id}")).raise_for_status()
                        gone.add(id)

    async def killed(server: Server) -> None:
        task = asyncio.create_task(edit_on(server))
        enough = made + order.randint(4, 6)  # the last one is not acknowledged yet
        while made < enough and not task.done():
            await asyncio.sleep(0.02)
        await asyncio.sleep(order.uniform(0, 2))
        server.process.kill()
        await task

    for _ in range(options.kills):
        with served(options, ledger) as server:
            asyncio.run(killed(server))
    with served(options, ledger) as server:
        listed = httpx2.get(f"{server.url}/v1/edits", params={"active": True, "limit": 1000}, trust_env=False)
        active = {each["id"]: each["requests"][0]["prompt"] for each in listed.json()["data"]}
        lost = sum(active.get(id) != prompt for id, prompt in kept.items())
    print(
        f"{options.kills} kills. Acknowledged: {len(kept)} edits, of which {lost} are lost, and {len(gone)} more that "
        f"were reverted, of which {len(gone & active.keys())} are back."
    )


RUN = {"overhead": overhead, "throughput": throughput, "edit": edit, "load": many_requests, "kill": kill}

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
