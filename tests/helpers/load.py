# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Twenty visitors for a minute: `make test-load`. Prints latencies, errors and memory of the page's process."""

import argparse
import random
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import psutil
from gradio_client import Client

from helpers.serving import serving


def visit(address: str, number: int, until: float, found: dict, errors: dict) -> None:
    """Move sliders as a visitor does, now and then on another tab, half a second between two movements."""
    client, chance = Client(address, verbose=False, analytics_enabled=False), random.Random(number)
    while time.monotonic() < until:
        seed = chance.randrange(1000)
        actions = {
            "sample": ("all", chance.choice((1, 1, 2, 4)), chance.random(), seed, 16),
            "trajectory": ("3", 5, seed),
            "steps_and_gamma": ("3", seed),
            "compare": ("all", 1, seed, 9),
            "interpolate_seeds": ("3", seed, seed + 1, 4, 9),
            "guide": ("3", 10.0, 8, 1.0, seed, 8),
        }
        tab = chance.choices(list(actions), (20, 2, 2, 2, 2, 1))[0]
        start = time.monotonic()
        try:
            client.predict("digits-ctm", *actions[tab], api_name=f"/{tab}")
            found[tab].append(time.monotonic() - start)
        except Exception as error:
            errors[f"{tab}: {type(error).__name__}: {str(error)[:100]}"] += 1
        time.sleep(chance.uniform(0.25, 0.75))


def main(clients: int, seconds: float) -> int:
    """Run, print a table, and return the number of errors."""
    found, errors = defaultdict(list), defaultdict(int)
    with serving() as (address, process):
        client, page = Client(address, verbose=False, analytics_enabled=False), psutil.Process(process)
        client.predict("digits-ctm", api_name="/sample")
        before, until = page.memory_info().rss / 2**20, time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda i: visit(address, i, until, found, errors), range(clients)))
        after = page.memory_info().rss / 2**20
        alive = client.predict("digits-ctm", api_name="/sample")[1]
    total = sum(map(len, found.values()))
    print(
        f"{clients} visitors for {seconds:g} s: {total} requests, {total / seconds:.1f} a second, "
        f"{sum(errors.values())} errors"
    )
    print("| action | requests | 50 % | 90 % | 99 % | longest |\n|---|--:|--:|--:|--:|--:|")
    for tab, times in sorted(found.items(), key=lambda item: -len(item[1])):
        times.sort()
        shares = [times[min(len(times) - 1, int(share * len(times)))] for share in (0.5, 0.9, 0.99)] + [times[-1]]
        print(f"| {tab} | {len(times)} | " + " | ".join(f"{1000 * value:.0f} ms" for value in shares) + " |")
    for error, count in errors.items():
        print(f"{count} times {error}")
    print(f"Memory of the page: {before:.0f} MiB before, {after:.0f} MiB after. Afterwards: {alive}")
    return sum(errors.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    raise SystemExit(main(options.clients, options.seconds) > 0)
