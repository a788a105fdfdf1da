"""The simulator as a program.

python -m bench.sim --ports 9001,9002 --control-port 9000 [--speed 4] [--resolver]

What comes in: how many replicas, how fast, which faults when. What goes out: the URLs, one a line,
and then it serves until it is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from dataclasses import replace
from pathlib import Path

import uvloop

from bench.sim import Config, Simulation, figures, parse_script


async def serve(config: Config) -> None:
    async with Simulation(config) as simulation:
        print(f"control http://127.0.0.1:{simulation.control_port}")
        for url in simulation.urls:
            print(url, flush=True)
        gc.freeze()
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.sim", description="Simulate vLLM replicas.")
    parser.add_argument("--replicas", type=int, default=4, help="how many, on ports of their own")
    parser.add_argument("--ports", default="", help="comma-separated, instead of --replicas")
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--served", default="sim-base", help="the base's name")
    parser.add_argument("--speed", type=float, default=1.0, help="how much faster than real time")
    parser.add_argument("--resolver", action="store_true", help="load unknown models on first use")
    parser.add_argument("--files", action="store_true", help="check an adapter's files at a load")
    parser.add_argument("--figures", type=Path, default=figures.FILE)
    parser.add_argument("--gpu-slots", type=int, help="instead of the figures'")
    parser.add_argument("--cpu-slots", type=int, help="instead of the figures'")
    parser.add_argument("--script", type=Path, help="a JSON file of faults")
    args = parser.parse_args()
    given = {"gpu_slots": args.gpu_slots, "cpu_slots": args.cpu_slots}
    slots = {name: value for name, value in given.items() if value is not None}
    config = Config(
        replicas=args.replicas,
        figures=replace(figures.read(args.figures), **slots),
        served=args.served,
        speed=args.speed,
        resolver=args.resolver,
        files=args.files,
        ports=tuple(int(port) for port in args.ports.split(",") if port),
        control_port=args.control_port,
        script=parse_script(args.script.read_bytes()) if args.script else (),
    )
    uvloop.run(serve(config))


if __name__ == "__main__":
    main()
