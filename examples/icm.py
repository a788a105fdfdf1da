"""Label claims without a single given label: keep the labels that predict one another.

Internal coherence maximization, after Wen et al., "Unsupervised Elicitation of Language Models"
(2025, arXiv:2506.10139), on true/false claims, through a loragate gateway:

    make serve                          # in one terminal
    python examples/icm.py              # in another, after pip install '.[examples]'

A labelling is as good as its labels are predictable: U = alpha * the mean, over its claims, of
log P(label | claim, all other claims with their labels). Contradictions are never let in: of the
claims that answer one question at most one is true. Simulated annealing looks for the best U. Each
iteration gives one claim the label that the model expects there, and keeps the change if U grows,
or, by chance, if it does not fall too far.

Every iteration is ONE call with all prompts of the current pool, not a call per prompt. The claim
labelled last stands last in every prompt, so what stands before it is still in the prefix cache.

The set beside this file is about the demo model's small world. The demo model is tiny and was
trained to judge such claims, the ones marked "seen" among them; so here you see the machinery, not
what the method can do. Bring your own with --model and --data.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TypeAlias

import httpx
import openai
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

QUESTION = "Claim: {claim}\nTrue or False? Answer:"
LABELS = {True: " True", False: " False"}
BETWEEN = "\n\n"

Labels: TypeAlias = dict[int, bool]
"""The label of each labelled claim, by its place in the data; the one given last comes last."""


@dataclass(frozen=True)
class Claim:
    """One line of the data. `label` is only used to draw the accuracy, never in the search."""

    question: str
    claim: str
    label: bool


@dataclass(frozen=True)
class Step:
    """An iteration, as it is plotted."""

    iteration: int
    pool: int
    score: float
    accuracy: float
    accepted: bool

    def __str__(self) -> str:
        return f"pool {self.pool}, score {self.score:.2f}, accuracy {self.accuracy:.0%}"


@dataclass(frozen=True)
class Cost:
    """What a way of asking took. `hit_rate` is None where vLLM's metrics were not to be had."""

    way: str
    prompts: int
    calls: int
    seconds: float
    hit_rate: float | None


class Model:
    """A model behind the gateway that says how likely each label is; counts its calls."""

    def __init__(self, client: openai.AsyncOpenAI, name: str, tokens: dict[bool, int]) -> None:
        self._client = client
        self._name = name
        self._tokens = tokens
        self.calls = 0
        self.prompts = 0

    async def ask(self, prompts: Sequence[str]) -> list[dict[bool, float]]:
        """log P of either label after each prompt, among the two: one call for all prompts."""
        self.calls += 1
        self.prompts += len(prompts)
        answer = await self._client.completions.create(
            model=self._name,
            prompt=list(prompts),
            max_tokens=1,
            temperature=0,
            logprobs=1,
            extra_body={
                "logprob_token_ids": list(self._tokens.values()),
                "return_tokens_as_token_ids": True,
            },
        )
        return [self._logprobs(choice) for choice in answer.choices]

    def _logprobs(self, choice: openai.types.CompletionChoice) -> dict[bool, float]:
        assert choice.logprobs is not None
        assert choice.logprobs.top_logprobs is not None
        (found,) = choice.logprobs.top_logprobs
        raw = {label: found[f"token_id:{token}"] for label, token in self._tokens.items()}
        total = max(raw.values()) + math.log1p(math.exp(-abs(raw[True] - raw[False])))
        return {label: value - total for label, value in raw.items()}


class Search:
    """Simulated annealing over labels; remembers the labels, their score and what it asks next."""

    def __init__(self, model: Model, claims: Sequence[Claim], options: argparse.Namespace) -> None:
        self._model = model
        self._claims = claims
        self._options = options
        self._rng = Random(options.seed)
        self.labels: Labels = {}
        self.score = -math.inf
        self._next = 0
        self._guess = True

    async def run(self) -> AsyncIterator[Step]:
        """Random labels for a few claims first; then one call an iteration."""
        for index in self._rng.sample(range(len(self._claims)), self._options.initial):
            label = self._rng.random() < 0.5
            self.labels = consistent(self._claims, self.labels, index, label)[-1]
        await self._weigh([self.labels], temperature=math.inf)
        for n in range(1, self._options.iterations + 1):
            warmth = self._options.hot / (1 + self._options.cooling * math.log(n))
            options = consistent(self._claims, self.labels, self._next, self._guess)
            changed = [labels for labels in options if labels is not self.labels]
            accepted = await self._weigh(changed, max(self._options.cold, warmth))
            accuracy = accuracy_of(self._claims, self.labels)
            yield Step(n, len(self.labels), self.score, accuracy, accepted)

    async def label_the_rest(self) -> None:
        """Give every claim the search never came to the label that the model expects, at once."""
        rest = [index for index in range(len(self._claims)) if index not in self.labels]
        if not rest:
            return
        answers = await self._model.ask([prompt(self._claims, self.labels, i) for i in rest])
        for index, answer in zip(rest, answers, strict=True):
            self.labels = consistent(self._claims, self.labels, index, likelier(answer))[-1]

    async def _weigh(self, candidates: list[Labels], temperature: float) -> bool:
        """Score the candidates and ask about the next claim in any world, in one call; move on."""
        self._next = self._rng.randrange(len(self._claims))
        worlds = [*candidates, self.labels]
        prompts = [prompt(self._claims, world, self._next) for world in worlds]
        for candidate in candidates:
            prompts += pool(self._claims, candidate)
        answers = await self._model.ask(prompts)
        guesses, rows = answers[: len(worlds)], answers[len(worlds) :]
        scores = []
        for candidate in candidates:
            mine, rows = rows[: len(candidate)], rows[len(candidate) :]
            scores.append(utility(candidate, mine, self._options.alpha))
        score, best = max(zip(scores, range(len(scores)), strict=True), default=(-math.inf, -1))
        change = score - self.score
        accepted = change > 0 or self._rng.random() < math.exp(change / temperature)
        if accepted:
            self.labels, self.score = candidates[best], score
        self._guess = likelier(guesses[best if accepted else -1])
        return accepted


def prompt(claims: Sequence[Claim], labels: Labels, index: int) -> str:
    """All other labelled claims, then this one without its label."""
    shown = [
        QUESTION.format(claim=claims[other].claim) + LABELS[label]
        for other, label in labels.items()
        if other != index
    ]
    return BETWEEN.join([*shown, QUESTION.format(claim=claims[index].claim)])


def pool(claims: Sequence[Claim], labels: Labels) -> list[str]:
    """The prompt of every labelled claim."""
    return [prompt(claims, labels, index) for index in labels]


def consistent(claims: Sequence[Claim], labels: Labels, index: int, label: bool) -> list[Labels]:
    """The labels with this one new and last; if that contradicts others, both ways to mend it.

    A label that is there already changes nothing, not even the order.
    """
    if labels.get(index) == label:
        return [labels]
    kept = {other: value for other, value in labels.items() if other != index}
    rivals = [
        other
        for other, value in kept.items()
        if label and value and claims[other].question == claims[index].question
    ]
    if not rivals:
        return [kept | {index: label}]
    rest = {other: value for other, value in kept.items() if other not in rivals}
    return [rest | dict.fromkeys(rivals, False) | {index: True}, kept | {index: False}]


def utility(labels: Labels, answers: Sequence[dict[bool, float]], alpha: float) -> float:
    """How well the labels predict one another; the mean, so that pools of any size compare."""
    found = [answer[label] for label, answer in zip(labels.values(), answers, strict=True)]
    return alpha * sum(found) / len(found)


def likelier(answer: dict[bool, float]) -> bool:
    return answer[True] > answer[False]


def accuracy_of(claims: Sequence[Claim], labels: Labels) -> float:
    right = [claims[index].label == label for index, label in labels.items()]
    return sum(right) / len(right)


class PrefixCache:
    """vLLM's own count of prompt tokens looked up in its prefix cache, and of those found."""

    def __init__(self, metrics_url: str | None) -> None:
        self._url = metrics_url

    def read(self) -> tuple[float, float]:
        if self._url is None:
            return 0.0, 0.0
        lines = httpx.get(self._url).raise_for_status().text.splitlines()
        queries, hits = (
            sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
            for name in ("vllm:prefix_cache_queries_total{", "vllm:prefix_cache_hits_total{")
        )
        return queries, hits


async def measured(
    way: str, model: Model, cache: PrefixCache, work: Callable[[], Awaitable[object]]
) -> Cost:
    """Do the work, and say what it took."""
    calls, prompts, before = model.calls, model.prompts, cache.read()
    started = time.perf_counter()
    await work()
    seconds = time.perf_counter() - started
    queries, hits = (now - then for now, then in zip(cache.read(), before, strict=True))
    rate = hits / queries if queries else None
    return Cost(way, model.prompts - prompts, model.calls - calls, seconds, rate)


async def compare(
    model: Model, cache: PrefixCache, claims: Sequence[Claim], labels: Labels
) -> list[Cost]:
    """Ask for the whole pool in three ways, each in an order that no cache has seen."""
    rng = Random()

    def shuffled() -> list[str]:
        return pool(claims, dict(rng.sample(list(labels.items()), len(labels))))

    async def in_turn(prompts: Sequence[str]) -> None:
        for each in prompts:
            await model.ask([each])

    async def at_once(prompts: Sequence[str]) -> None:
        await asyncio.gather(*(model.ask([each]) for each in prompts))

    one, many, whole = shuffled(), shuffled(), shuffled()
    return [
        await measured("one after another", model, cache, lambda: in_turn(one)),
        await measured("concurrent", model, cache, lambda: at_once(many)),
        await measured("one batch", model, cache, lambda: model.ask(whole)),
    ]


def plot(steps: Sequence[Step], file: Path, title: str) -> None:
    """Score and accuracy by iteration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 5), layout="constrained")
    at = [step.iteration for step in steps]
    above.plot(at, [step.score for step in steps], color="tab:blue")
    above.set(ylabel="score U", title=title)
    below.plot(at, [step.accuracy for step in steps], color="tab:green")
    below.axhline(0.5, color="grey", linestyle=":", label="chance")
    below.set(ylabel="accuracy of the pool", xlabel="iteration (one call each)", ylim=(0, 1.05))
    below.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def table(costs: Sequence[Cost]) -> Table:
    made = Table("asked", "prompts", "calls", "seconds", "prefix-cache hits")
    for column in made.columns[1:]:
        column.justify = "right"
    for cost in costs:
        rate = "-" if cost.hit_rate is None else f"{cost.hit_rate:.1%}"
        made.add_row(cost.way, str(cost.prompts), str(cost.calls), f"{cost.seconds:.2f}", rate)
    return made


def read(file: Path, count: int, rng: Random) -> list[Claim]:
    """Some of the data, question by question, so that claims may contradict each other."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    claims = [Claim(row["question"], row["claim"], row["label"]) for row in rows]
    questions = sorted({claim.question for claim in claims})
    place = {question: rng.random() for question in questions}
    return sorted(claims, key=lambda claim: place[claim.question])[:count]


def label_tokens(url: str, key: str, model: str) -> dict[bool, int]:
    """The token id of each label."""
    found = {}
    for label, text in LABELS.items():
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/tokenize", json=body, headers=headers, timeout=60)
        tokens = answer.raise_for_status().json()["tokens"]
        if len(tokens) != 1:
            raise SystemExit(f"{text!r} is {len(tokens)} tokens of {model}; choose other LABELS")
        found[label] = tokens[0]
    return found


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    here = Path(__file__)
    parser = argparse.ArgumentParser(
        description="Label search by mutual predictability.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8080", help="the gateway")
    add("--key", default="none", help="its API key, if it wants one")
    add("--model", default="demo", help="a base, or an adapter as name@version")
    add("--metrics", help="the address of a vLLM's own /metrics, for the hit rates")
    add("--data", type=Path, default=here.with_name("true_false.jsonl"), help="JSON lines")
    add("--items", type=int, default=24, help="claims to label")
    add("--iterations", type=int, default=80, help="calls of the search")
    add("--initial", type=int, default=8, help="claims labelled at random to begin with")
    add("--alpha", type=float, default=50.0, help="what a nat of mean log P is worth")
    add("--hot", type=float, default=10.0, help="temperature at the start")
    add("--cold", type=float, default=0.01, help="the lowest temperature")
    add("--cooling", type=float, default=0.99, help="hot / (1 + cooling * log(iteration))")
    add("--seed", type=int, default=0, help="of every choice made here")
    add("--out", type=Path, default=Path("build/icm"), help="folder for the plot and the labels")
    options = parser.parse_args(argv)
    if not 1 <= options.initial <= options.items:
        parser.error("--initial is between 1 and --items")
    return options


async def main(options: argparse.Namespace) -> None:
    console = Console(highlight=False)
    claims = read(options.data, options.items, Random(options.seed))
    tokens = label_tokens(options.url, options.key, options.model)
    cache = PrefixCache(options.metrics)
    steps: list[Step] = []
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    url = f"{options.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=options.key, timeout=600) as client:
        model = Model(client, options.model, tokens)
        search = Search(model, claims, options)

        async def anneal() -> None:
            with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
                bar = progress.add_task("starting", total=options.iterations)
                async for step in search.run():
                    steps.append(step)
                    progress.update(bar, advance=1, description=str(step))

        searched = await measured("the search", model, cache, anneal)
        await search.label_the_rest()
        costs = [searched, *await compare(model, cache, claims, search.labels)]
    console.print(table(costs))
    accuracy = accuracy_of(claims, search.labels)
    console.print(f"{accuracy:.0%} of {len(search.labels)} labels are as in the data.")

    options.out.mkdir(parents=True, exist_ok=True)
    plot(steps, options.out / "icm.png", f"ICM: {options.model}, {len(claims)} claims")
    result = {
        "model": options.model,
        "accuracy": accuracy,
        "steps": [asdict(step) for step in steps],
        "costs": [asdict(cost) for cost in costs],
        "labels": [asdict(claims[i]) | {"found": label} for i, label in search.labels.items()],
    }
    (options.out / "icm.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"The plot and the labels are in {options.out}/icm.png and icm.json.")


if __name__ == "__main__":
    asyncio.run(main(arguments()))
