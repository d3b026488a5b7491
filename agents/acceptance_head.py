"""Trains a model's acceptance head: what its early layers know of whether a draft will be accepted.

Texts are the model's own: it continues prompts, at several temperatures, and one pass over each text then gives the
state at every candidate layer, what that layer would draft there, and the chance p / q that full depth keeps it. Of
that chance the head learns the distribution, by cross-entropy: for a uniform number u, whether u < p / q. A second
answer is how likely the *next* draft is accepted, should this one be.

    python -m agents.acceptance_head --openings openings.jsonl --out runs/acceptance_head

Half an hour on a laptop for 300,000 positions; six million take four minutes on a GPU, and more texts help most.
Prompts are the training ones of this project and those given; how the head fares on the validation ones is reported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import Tensor

from lede_env.arguments import clear_errors
from lede_env.display.progress import progress_bar
from lede_env.engine.acceptance_head import INPUTS, STEEPEST, SURE, AcceptanceHead, inputs_of
from lede_env.engine.layered_lm import LayeredLM, rms_norm
from lede_env.engine.signals import OUTLOOK, margins, warmth
from lede_env.errors import LedeError
from lede_env.models.loading import load_model, resolve_device, resolve_folder
from lede_env.tasks import fit_prompt, load_prompts

PROMPT_TOKENS = 380  # of a training context, at most
CLASSES = (0.0, 0.6, None)  # temperatures a position is learned at; None: a random one, of its own
ODDS = (0.35, 0.55, 0.1)  # how often each is learned
FIRST = 0.8  # how often the first candidate is, which is asked most
TEXTS_TOGETHER, POSITIONS_TOGETHER = 64, 4096  # in memory at once: states of all layers, and logits


@dataclass
class Args:
    """Train on the model's own continuations; writes head.safetensors and head.json."""

    model: str = "tiny"  # zoo name, folder or hub id, as transformers loads it
    prompts: tuple[str, ...] = ()  # .jsonl files or tasks besides this project's prompts; splits as they say
    openings: tuple[str, ...] = ()  # likewise, of many more contexts, such as lede_env.openings writes
    temperatures: tuple[float, ...] = (0.6, 0.6, 0.0)  # of the texts; an opening is continued at one of them, in turn
    repeats: int = 16  # continuations of a prompt at each temperature; greedily one
    max_new_tokens: int = 112
    batch: int = 1024  # texts generated together
    out: Path = Path("runs/acceptance_head")
    device: str = "auto"
    seed: int = 0

    hidden: int = 128
    epochs: float = 12.0
    dropout: float = 0.1
    learning_rate: float = 2e-3
    rows: int = 8192  # positions a step

    def __post_init__(self) -> None:
        for name in ("repeats", "max_new_tokens", "batch", "hidden", "rows"):
            if getattr(self, name) < 1:
                raise LedeError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0.0:
                raise LedeError(f"{name}={getattr(self, name)}; expected a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise LedeError(f"dropout={self.dropout}; expected a share in [0, 1)")
        if not self.temperatures or min(self.temperatures) < 0.0:
            raise LedeError(f"temperatures={self.temperatures}; expected at least one, none below 0")


class Model:
    """The language model by transformers, which generates batches fast, and what the head reads of it."""

    def __init__(self, name: str, device: str):
        from transformers import AutoModelForCausalLM

        self.lm = load_model(name, device="cpu", dtype="float32")  # checks it; candidates, tokenizer, fingerprint
        self.device = resolve_device(device)
        folder, _ = resolve_folder(name)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(self.device)
        self.layers = self.lm.candidate_layers
        self.final_norm, self.eps = self.lm.final_norm.to(self.device), self.lm.norm_eps.to(self.device)

    @torch.inference_mode()
    def continuations(
        self, prompts: Sequence[list[int]], temperature: float, args: Args
    ) -> list[tuple[int, list[int]]]:
        """(prompt's length, prompt and continuation) of each prompt, up to its EOS, those of a length together."""
        texts = []
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ordered = sorted(prompts, key=len)
        for begin in range(0, len(ordered), args.batch):
            part = ordered[begin : begin + args.batch]
            width = len(part[-1])
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in part])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
            eos = list(self.lm.eos_ids)
            made = self.model.generate(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), pad_token_id=eos[0],
                eos_token_id=eos, max_new_tokens=args.max_new_tokens, **sampling,
            )[:, width:].tolist()  # fmt: skip
            for prompt, new in zip(part, made, strict=True):
                end = next((at for at, token in enumerate(new) if token in eos), len(new) - 1)
                texts.append((len(prompt), prompt + new[: end + 1]))
        return texts

    @torch.inference_mode()
    def positions(self, texts: Sequence[tuple[int, list[int]]], seed: int) -> dict[str, Tensor]:
        """What the head learns from, position by position, N in all; C candidates, K `CLASSES`.

        state (N, C, H) normed; margin (N, C); target (N,) and its shortfall (N, C); warmth (N, K); draft
        (N, C, K) with its shortfall, chance p(x) / q(x) and the expected chance; last (N,) of a text.
        """
        generator, parts = torch.Generator(self.device).manual_seed(seed), []
        ordered = sorted(texts, key=lambda text: len(text[1]))
        for begin in range(0, len(ordered), TEXTS_TOGETHER):
            part = ordered[begin : begin + TEXTS_TOGETHER]
            ids = torch.zeros(len(part), len(part[-1][1]), dtype=torch.long)
            seen = torch.zeros_like(ids, dtype=torch.bool)
            for row, (count, tokens) in enumerate(part):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                seen[row, count - 1 : len(tokens) - 1] = True
            ids, seen = ids.to(self.device), seen.to(self.device)
            out = self.model.model(ids, output_hidden_states=True)
            states = torch.stack([out.hidden_states[layer][seen] for layer in self.layers], 1)  # (n, C, H)
            states = rms_norm(states, self.final_norm, self.eps)
            targets = ids.roll(-1, 1)[seen]
            row = seen.nonzero()[:, 0]
            last = torch.ones_like(row, dtype=torch.bool)
            last[:-1] = row[1:] != row[:-1]
            full = out.last_hidden_state[seen]
            for chunk in torch.arange(len(full), device=self.device).split(POSITIONS_TOGETHER):
                learned = self._learned(states[chunk], full[chunk], targets[chunk], generator)
                parts.append(learned | {"last": last[chunk]})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _learned(self, states: Tensor, full: Tensor, targets: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        count, width = states.shape[:2]
        at_full, logits = self.model.lm_head(full), self.model.lm_head(states)  # (n, V), (n, C, V)
        best = logits.amax(-1)
        random = 0.2 + torch.rand(count, generator=generator, device=self.device)
        made: dict[str, list[Tensor]] = {"warmth": [], "draft": [], "shortfall": [], "chance": [], "expected": []}
        for temperature in CLASSES:
            if temperature == 0.0:
                draft = logits.argmax(-1)
                chance = expected = (draft == at_full.argmax(-1, keepdim=True)).float()
                warm = torch.zeros_like(random)
            else:
                heat = random if temperature is None else torch.full_like(random, temperature)
                p, q = (at_full / heat[:, None]).softmax(-1)[:, None], (logits / heat[:, None, None]).softmax(-1)
                draft = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(count, width)
                own = draft.unsqueeze(-1)
                chance = (p.expand_as(q).gather(-1, own) / q.gather(-1, own))[..., 0].clamp_max(1.0)
                expected, warm = torch.minimum(p, q).sum(-1), warmth(heat)
            short = best - logits.gather(-1, draft.unsqueeze(-1))[..., 0]
            for name, value in zip(made, (warm, draft.int(), short, chance, expected), strict=True):
                made[name].append(value)
        of_target = best - logits.gather(-1, targets[:, None, None].expand(-1, width, 1))[..., 0]
        fixed = {
            "state": states.half(),
            "margin": margins(logits),
            "target": targets.int(),
            "target_shortfall": of_target,
        }
        return fixed | {name: torch.stack(values, -1) for name, values in made.items()}


class Net(torch.nn.Module):
    """The head while it learns; what `head` makes of it computes the same."""

    def __init__(self, hidden: int, state: int, embedding: Tensor, layers: int, drop: float):
        super().__init__()
        self.register_buffer("embedding", embedding / embedding.std())
        self.state = torch.nn.Linear(state, hidden)
        self.token = torch.nn.Linear(embedding.shape[1], hidden, bias=False)
        self.signals = torch.nn.Linear(INPUTS, hidden, bias=False)
        self.layer = torch.nn.Embedding(layers, hidden)
        self.middle = torch.nn.Linear(hidden, hidden)
        self.out = torch.nn.Linear(hidden, OUTLOOK)
        self.drop = torch.nn.Dropout(drop)
        torch.nn.init.zeros_(self.layer.weight)

    def forward(self, state: Tensor, token: Tensor, signals: Tensor, layer: Tensor) -> Tensor:
        x = self.state(state) + self.token(self.embedding[token]) + self.signals(signals) + self.layer(layer)
        return self.out(self.drop(F.relu(self.middle(self.drop(F.relu(x))))))

    def head(self, lm: LayeredLM, sure: Tensor, training: dict[str, Any]) -> AcceptanceHead:
        """For the engine: the token's layer as a table, all in the precision of the file; `sure_answer` with them."""
        tensors = {
            "state": self.state.weight.T,
            "token": self.embedding @ self.token.weight.T,
            "signals": self.signals.weight.T,
            "bias": self.layer.weight + self.state.bias,
            "middle": self.middle.weight.T,
            "middle_bias": self.middle.bias,
            "out": self.out.weight.T,
            "out_bias": self.out.bias,
            "sure": sure,
        }
        arrays: dict[str, Any] = {name: t.detach().cpu().half().float().contiguous() for name, t in tensors.items()}
        return AcceptanceHead(lm.fingerprint, lm.candidate_layers, **arrays, training=training)


def sure_answer(data: dict[str, Tensor]) -> Tensor:
    """(3,) odds, log slope and ahead of the drafts that are sure, greedily and at T = 0.6; whatever their coins."""
    counts = torch.ones(2, 2)  # of the draft and the next one: accepted, and not
    far = data["margin"] >= SURE  # (N, C)
    # The next draft, should this one be accepted: then it is the text's token.
    goes_on = (far & (data["target_shortfall"] == 0.0))[:-1] & ~data["last"][:-1, None]
    for kind in (0, 1):
        sure = far & (data["shortfall"][..., kind] == 0.0)
        for row, kept in enumerate((data["chance"][..., kind][sure], data["expected"][1:, :, kind][goes_on])):
            counts[row] += torch.stack([kept.sum(), (1.0 - kept).sum()]).cpu()
    odds, ahead = (counts[:, 0] / counts[:, 1]).log()
    return torch.stack([odds, torch.tensor(-STEEPEST), ahead])


def losses(net: Net, data: dict[str, Tensor], rows: Tensor, layer: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) cross-entropies of rows at a candidate each and a class each: of the acceptance, and of the next one."""
    warm = data["warmth"][rows, kind]
    margin = data["margin"][rows, layer]
    state = data["state"][rows, layer].float()
    draft, shortfall = data["draft"][rows, layer, kind].long(), data["shortfall"][rows, layer, kind]
    answer = net(state, draft, inputs_of(margin, shortfall, warm), layer)
    coin = torch.where(warm > 0, torch.rand_like(warm).clamp_min(1e-6), 1.0)
    log_odds = answer[:, 0] - answer[:, 1].clamp(-STEEPEST, STEEPEST).exp() * coin.log()
    kept = (coin <= data["chance"][rows, layer, kind]).float()
    own = F.binary_cross_entropy_with_logits(log_odds, kept, reduction="none")
    # The next draft, should this one be accepted: then it is the text's token.
    goes_on = ~data["last"][rows]
    following = (rows + 1).clamp_max(len(data["last"]) - 1)
    shortfall = data["target_shortfall"][rows, layer]
    answer = net(state, data["target"][rows].long(), inputs_of(margin, shortfall, warm), layer)
    # At the same temperature; a random one is another at the next position, so there class 1 stands in.
    expected = data["expected"][following, layer, kind.clamp_max(1)]
    further = F.binary_cross_entropy_with_logits(answer[:, 2], expected, reduction="none") * goes_on * (kind < 2)
    return own, further


def fit(data: dict[str, dict[str, Tensor]], args: Args, net: Net, bar: Any) -> list[dict[str, Any]]:
    """Train the net; returns its cross-entropies on each split."""
    train, n = data["train"], len(data["train"]["last"])
    device, width = train["last"].device, train["draft"].shape[1]
    steps = max(int(args.epochs * n / args.rows), 10)
    optimizer = torch.optim.AdamW(net.parameters(), args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * args.learning_rate, steps)
    odds = torch.tensor(ODDS, device=device)
    shallow = torch.tensor([FIRST] + [(1.0 - FIRST) / max(width - 1, 1)] * (width - 1), device=device)
    task = bar.add_task("fitting", total=steps)
    for _ in range(steps):
        rows = torch.randint(n, (args.rows,), device=device)
        layer, kind = torch.multinomial(shallow, args.rows, True), torch.multinomial(odds, args.rows, True)
        own, further = losses(net, train, rows, layer, kind)
        loss = own.mean() + 0.3 * further.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.advance(task)
    return [report(net, data[split], split) for split in data]


@torch.inference_mode()
def report(net: Net, data: dict[str, Tensor], split: str) -> dict[str, Any]:
    """Mean cross-entropies at the first candidate, greedy and at temperature 0.6."""
    net.eval()
    torch.manual_seed(0)
    result: dict[str, Any] = {"split": split, "positions": len(data["last"])}
    for kind, name in ((0, "greedy"), (1, "T=0.6")):
        sums = torch.zeros(2)
        total = 0
        for rows in torch.arange(min(len(data["last"]), 400_000), device=data["last"].device).split(65536):
            own, further = losses(net, data, rows, torch.zeros_like(rows), torch.full_like(rows, kind))
            sums += torch.stack([own.sum(), further.sum()]).cpu()
            total += len(rows)
        result |= {name: float(sums[0] / total), f"{name} next": float(sums[1] / total)}
    net.train()
    return result


def gather(args: Args, model: Model, bar: Any) -> dict[str, dict[str, Tensor]]:
    """Positions of the training and validation prompts' continuations."""
    data, number = {}, args.seed
    for split in ("train", "validation"):
        jobs: dict[float, list[list[int]]] = {heat: [] for heat in args.temperatures}
        for ids in encoded(model, ["all", *args.prompts], split):
            for heat, texts in jobs.items():
                texts += [ids] * (args.repeats if heat and split == "train" else 1)
        if args.openings and split == "train":
            for at, ids in enumerate(encoded(model, args.openings, split)):
                jobs[args.temperatures[at % len(args.temperatures)]].append(ids)
        made: list[tuple[int, list[int]]] = []
        for heat, texts in bar.track(jobs.items(), description=f"continuing the {split} prompts"):
            torch.manual_seed(number := number + 1)
            made += model.continuations(texts, heat, args)
        data[split] = model.positions(made, args.seed)
    return data


def encoded(model: Model, sources: Sequence[str], split: str) -> list[list[int]]:
    """Token ids of prompts, cut to `PROMPT_TOKENS`."""
    prompts = load_prompts(list(sources), split)
    return [fit_prompt(model.lm.encode(each.text), PROMPT_TOKENS, each.task)[0] for each in prompts]


def main(args: Args) -> None:
    console = Console()
    with progress_bar(console) as bar:
        model = Model(args.model, args.device)
        data = gather(args, model, bar)
        torch.manual_seed(args.seed)
        embedding = model.lm.embedding.to(model.device)
        net = Net(args.hidden, model.final_norm.shape[0], embedding, len(model.layers), args.dropout)
        net = net.to(model.device)
        # Out of inference mode, which no gradient passes.
        data = {split: {name: value.clone() for name, value in arrays.items()} for split, arrays in data.items()}
        rows = fit(data, args, net, bar)
    about = {"agent": "acceptance_head", "args": {**asdict(args), "out": str(args.out)}, "cross_entropy": rows}
    head = net.head(model.lm, sure_answer(data["train"]), json.loads(json.dumps(about)))
    console.print(f"{head.save(args.out)}: {rows}")


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
