"""A fleet of vLLM servers without a GPU: real sockets, vLLM's dialect, simulated time and memory.

    async with Simulation(Config(replicas=2)) as sim:
        url = sim.replicas[0].url

    python -m bench.sim --replicas 64 --control-port 9000

What goes out: `Simulation` and what it takes to describe one. See `engine` for the model of time,
`slots` and `prefix` for the model of memory, `faults` for what can go wrong.
"""

from bench.sim.answers import said
from bench.sim.faults import Fault, Kind, Scripted, parse_script
from bench.sim.figures import Figures, read
from bench.sim.replica import Replica
from bench.sim.simulation import Config, Simulation

__all__ = [
    "Config",
    "Fault",
    "Figures",
    "Kind",
    "Replica",
    "Scripted",
    "Simulation",
    "parse_script",
    "read",
    "said",
]
