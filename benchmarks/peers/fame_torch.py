"""Times a training epoch of FAME in plain PyTorch, in the literature's way, on a sequence file.

The equations are those of fame_jax/models/fame.py at the project's defaults (`--parity` shows it).
The practice is that of RecBole and DuoRec: every prefix of every history is a row of its own,
padded at its left to one length and read at its last position, with cross-entropy over the whole
catalogue. Three forms: `all_positions` runs the facet block on every position of a row, as a block
of the backbone would; `last_only` runs it for the last position only; `sasrec` has one more plain
block in its place. With --device=cuda rows and model are on the GPU. See README.md.
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import record
import torch
import torch.nn.functional as F
from torch import nn

FORMS = ('all_positions', 'last_only')  # of FAME
MASKED = -1e9
TOLERANCE = 1e-4  # of --parity
EPSILON = 1e-6  # of Flax's LayerNorm

# Fields of `Fame`, with the names of the project's options.
SETTINGS = {
    'width': 64,
    'num_blocks': 2,
    'num_heads': 2,
    'num_experts': 8,
    'dropout': 0.5,
    'temperature': 0.07,
}


class Attention(nn.Module):
    """Experts' queries over the keys and values of their head, with a bias by distance.

    One expert a head is the plain attention of the backbone, without its output projection.
    """

    def __init__(self, width, num_heads, num_experts, max_len, dropout):
        super().__init__()
        self.heads, self.experts, self.head_width = num_heads, num_experts, width // num_heads
        self.query = nn.Linear(width, width * num_experts)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.distance = nn.Parameter(torch.zeros(num_heads, max_len))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, last):
        """[B, L, D] -> [B, L, H, N, K], or [B, 1, H, N, K] if `last`."""
        query_input = x[:, -1:] if last else x
        query = self.query(query_input) * self.head_width**-0.5
        query = query.unflatten(-1, (self.heads, self.experts, -1)).permute(0, 2, 3, 1, 4)
        key = self.key(x).unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1)
        value = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        # A head's experts share its keys: their queries are rows of one product.
        logit = (query.flatten(2, 3) @ key).unflatten(2, (self.experts, -1))
        weight = (logit + self.bias(mask, last)).softmax(dim=-1)
        mixed = (self.dropout(weight).flatten(2, 3) @ value).unflatten(2, (self.experts, -1))
        return mixed.permute(0, 3, 1, 2, 4)

    def bias(self, mask, last):
        """The mask and the bias by distance, to be added to the logits: [B, H, 1, Q, S]."""
        at = torch.arange(mask.shape[-1], device=mask.device)
        query_at = at[-1:] if last else at
        table = self.distance[:, (query_at[:, None] - at).clamp(min=0)]
        return (mask[:, -1:] if last else mask)[:, None, None] + table[:, None]


class Block(nn.Module):
    """SASRec's block, post-LayerNorm, GELU by its tanh form."""

    def __init__(self, width, num_heads, max_len, dropout):
        super().__init__()
        self.attention = Attention(width, num_heads, 1, max_len, dropout)
        self.output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=EPSILON)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):
        """[B, L, D] -> [B, L, D]."""
        mixed = self.output(self.attention(x, mask, last=False).flatten(2))
        x = self.attention_norm(x + self.dropout(mixed))
        inner = F.gelu(self.up(x), approximate='tanh')
        return self.feed_forward_norm(x + self.dropout(self.down(inner)))


class FacetBlock(nn.Module):
    """FAME's last block: experts in each head, a prediction per head, the gate over heads."""

    def __init__(self, width, num_heads, num_experts, max_len, dropout):
        super().__init__()
        self.heads, head_width = num_heads, width // num_heads
        self.attention = Attention(width, num_heads, num_experts, max_len, dropout)
        self.router = nn.Parameter(torch.empty(num_heads, num_experts * head_width, num_experts))
        self.attention_norm = nn.LayerNorm(width, eps=EPSILON)
        self.up, self.down = nn.Linear(head_width, head_width), nn.Linear(head_width, head_width)
        self.feed_forward_norm = nn.LayerNorm(head_width, eps=EPSILON)
        self.gate = nn.Linear(width, num_heads)
        self.facet = nn.Linear(width, width, bias=False)  # the W_f of all heads side by side
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, last):
        """[B, L, D] -> the query u of each position, [B, L, D], or [B, 1, D] if `last`."""
        mixed = self.attention(x, mask, last)
        logit = torch.einsum('blhe,hen->blhn', mixed.flatten(3), self.router)  # (16)
        f = (logit.softmax(dim=-1)[..., None] * mixed).sum(dim=3)  # (17)
        query_input = x[:, -1:] if last else x
        f = self.attention_norm(query_input + self.dropout(f.flatten(2)))
        f = f.unflatten(-1, (self.heads, -1))
        f = self.feed_forward_norm(f + self.dropout(self.down(self.up(f).relu())))  # (7)
        gate = self.gate(f.flatten(2)).softmax(dim=-1) * self.heads  # (10)
        return self.facet((gate[..., None] * f).flatten(2))  # (8, 9, 11), collapsed


class Fame(nn.Module):
    """Items in, scores of the catalogue at the last position out."""

    def __init__(
        self,
        num_items,
        max_len,
        width,
        num_blocks,
        num_heads,
        num_experts,
        dropout,
        temperature,
        last_only,
        facets=True,
    ):
        super().__init__()
        self.temperature, self.last_only, self.facets = temperature, last_only, facets
        self.items = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.input_norm = nn.LayerNorm(width, eps=EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, max_len, dropout) for _ in range(num_blocks - facets)
        )
        if facets:
            self.facet_block = FacetBlock(width, num_heads, num_experts, max_len, dropout)
        later = torch.ones(max_len, max_len, dtype=torch.bool).triu(1)
        self.register_buffer('later', later, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """N(0, 0.02), biases 0, and each head's slice of the item for W_f."""
        for name, parameter in self.named_parameters():
            if name.endswith(('items.weight', 'router')) or parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(('bias', 'distance')):
                nn.init.zeros_(parameter)
        if self.facets:
            nn.init.eye_(self.facet_block.facet.weight)

    def query(self, tokens):
        """[B, L] -> [B, D], of length 1 / temperature."""
        hidden = (self.later | (tokens == 0)[:, None]) * MASKED
        x = self.dropout(self.input_norm(self.items(tokens)))
        for block in self.blocks:
            x = block(x, hidden)
        if self.facets:
            x = self.facet_block(x, hidden, self.last_only)
        return F.normalize(x[:, -1]) / self.temperature

    def forward(self, tokens):
        """[B, L] -> scores [B, V], of items 1 to V."""
        return self.query(tokens) @ F.normalize(self.items.weight[1:]).T


def read_sequences(path):
    """One user a line, `user item item ...`, oldest first. Returns [[item, ...], ...]."""
    return [line.split()[1:] for line in path.read_text().splitlines()]


def prefix_rows(sequences, max_len):
    """Rows [P, max_len], padded at the left, and targets [P]: all but each user's last two items.

    Also returns the number of items in the whole file.
    """
    ids = {}
    sequences = [[ids.setdefault(item, len(ids) + 1) for item in items] for items in sequences]
    rows, targets = [], []
    for items in sequences:
        for at in range(1, len(items) - 2):
            prefix = items[max(0, at - max_len) : at]
            rows.append([0] * (max_len - len(prefix)) + prefix)
            targets.append(items[at])
    return torch.tensor(rows), torch.tensor(targets), len(ids)


class Training:
    """One form of the model in training, batch after batch of shuffled prefixes."""

    def __init__(self, rows, targets, num_items, form, args):
        torch.manual_seed(args.seed)
        self.rows, self.targets = rows.to(args.device), targets.to(args.device)
        self.batch = args.batch
        about = {'last_only': form == 'last_only', 'facets': form != 'sasrec', **settings(args)}
        model = Fame(num_items, args.max_len, **about).to(args.device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)
        self.model = torch.compile(model) if args.compile else model
        self.batches, self.seconds, self.losses = self.shuffled(), [], []

    def shuffled(self):
        """Epochs without end, of whole batches."""
        while True:
            order = torch.randperm(len(self.rows), device=self.rows.device)
            for begin in range(0, len(order) - self.batch + 1, self.batch):
                chosen = order[begin : begin + self.batch]
                yield self.rows[chosen], self.targets[chosen]

    def step(self):
        """Forward, backward, Adam. Returns the loss."""
        tokens, targets = next(self.batches)
        loss = F.cross_entropy(self.model(tokens), targets - 1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def time_steps(self, count):
        """Times so many steps, gathering of their rows included."""
        for _ in range(count):
            began = time.perf_counter()
            self.losses.append(self.step())
            self.seconds.append(time.perf_counter() - began)

    def result(self):
        """Batches timed so far, and an epoch at their median."""
        batches = -(-len(self.rows) // self.batch)
        figures = record.summarize(self.seconds, batches, float(np.mean(self.losses)))
        return figures | {'loss_terms_per_epoch': len(self.rows), 'parameters': self.parameters}


def settings(args):
    """The fields of the model, from the flags of the same names."""
    return {name: getattr(args, name) for name in SETTINGS}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data_dir', type=pathlib.Path, help='holds DATASET.txt')
    parser.add_argument('--dataset', default='Toys_and_Games')
    parser.add_argument('--warmup', type=int, default=5, help='untimed batches before the clock')
    parser.add_argument('--batch', type=int, default=256, help='prefixes')
    parser.add_argument('--max_len', type=int, default=50)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--compile', action='store_true', help='torch.compile')
    parser.add_argument(
        '--forms', default=','.join(FORMS), help='of all_positions, last_only, sasrec'
    )
    parser.add_argument('--seed', type=int, default=2020)
    parser.add_argument(
        '--turns', action='store_true', help='time as many batches as each line of stdin says'
    )
    parser.add_argument('--parity', type=pathlib.Path, help='an .npz to compare with; see `parity`')
    for name, value in SETTINGS.items():
        parser.add_argument(f'--{name}', type=type(value), default=value)
    args = parser.parse_args()
    if args.warmup < 0 or args.threads < 1:
        parser.error('--threads must be at least 1, --warmup at least 0')
    if bool(args.parity) == args.turns or (args.turns and not args.data_dir):
        parser.error('give either --turns and --data_dir, or --parity')
    return args


def prepare(args):
    """The settings and counts of the run, and each form after its warm-up batches."""
    figures = record.describe_run(args, 'FAME', settings(args))
    sequences = read_sequences(args.data_dir / f'{args.dataset}.txt')
    rows, targets, num_items = prefix_rows(sequences, args.max_len)
    if len(rows) < args.batch:
        raise SystemExit(f'{len(rows)} prefixes are less than a --batch of {args.batch}')
    forms = args.forms.split(',')
    trainings = {form: Training(rows, targets, num_items, form, args) for form in forms}
    for training in trainings.values():
        for _ in range(args.warmup):
            training.step()
    return figures | {'targets_per_epoch': len(rows), 'items': num_items}, trainings


def take_turns(trainings, count, at_a_time=5):
    """Times so many batches of every form, a few of each at a time. Returns {form: figures}."""
    for done in range(0, count, at_a_time):
        for training in trainings.values():
            training.time_steps(min(at_a_time, count - done))
    return {form: training.result() for form, training in trainings.items()}


def serve_turns(figures, trainings):
    """Prints the settings as JSON, then after each line of stdin the figures so far."""
    print(json.dumps(figures), flush=True)
    for line in sys.stdin:
        print(json.dumps(take_turns(trainings, int(line))), flush=True)


def rows_of_heads(w):
    """[..., D, K], heads (and experts) first -> [... * K, D], as nn.Linear has it."""
    return w.swapaxes(-1, -2).reshape(-1, w.shape[-2])


# Paths of the project's parameters -> names here, and how a layout becomes the other.
NORM = {'scale': 'weight', 'bias': 'bias'}
NORMS = {
    f'{norm}/{name}': (f'{norm}.{ours}', np.asarray)
    for norm in ('attention_norm', 'feed_forward_norm')
    for name, ours in NORM.items()
}
ATTENTION = {'distance': ('attention.distance', np.asarray)}
for part in ('query', 'key', 'value'):
    ATTENTION[part] = f'attention.{part}.weight', rows_of_heads
    ATTENTION[f'{part}_bias'] = f'attention.{part}.bias', np.ravel
BLOCK = {
    **{f'attention/{name}': there for name, there in ATTENTION.items()},
    'attention/output': ('output.weight', lambda w_HKD: w_HKD.reshape(-1, w_HKD.shape[-1]).T),
    'attention/output_bias': ('output.bias', np.asarray),
    'feed_forward/up/kernel': ('up.weight', np.transpose),
    'feed_forward/up/bias': ('up.bias', np.asarray),
    'feed_forward/down/kernel': ('down.weight', np.transpose),
    'feed_forward/down/bias': ('down.bias', np.asarray),
    **NORMS,
}
FACET_BLOCK = {
    **ATTENTION,
    'router': ('router', np.asarray),
    'up': ('up.weight', lambda w_1KK: w_1KK[0].T),
    'up_bias': ('up.bias', np.ravel),
    'down': ('down.weight', lambda w_1KK: w_1KK[0].T),
    'down_bias': ('down.bias', np.ravel),
    'gate': ('gate.weight', np.transpose),
    'gate_bias': ('gate.bias', np.asarray),
    'facet': ('facet.weight', lambda w_HDK: w_HDK.swapaxes(0, 1).reshape(w_HDK.shape[1], -1)),
    **NORMS,
}


def torch_layout(flat):
    """The project's parameters (or gradients) {path: array}, as a state of `Fame`."""
    names = {'item_table': ('items.weight', np.asarray)}
    names |= {
        f'input_norm/{name}': (f'input_norm.{ours}', np.asarray) for name, ours in NORM.items()
    }
    names |= {
        f'facet_block/{path}': (f'facet_block.{n}', f) for path, (n, f) in FACET_BLOCK.items()
    }
    for i in {path.split('/')[0].removeprefix('block_') for path in flat if path[:6] == 'block_'}:
        names |= {f'block_{i}/{path}': (f'blocks.{i}.{n}', f) for path, (n, f) in BLOCK.items()}
    return {names[path][0]: torch.tensor(names[path][1](x)) for path, x in flat.items()}


def parity(path):
    """The largest differences from a FAME of the project on some rows, of each form.

    path: an .npz of tokens [B, L], padded at the left; targets [B]; temperature; query [B, D];
    score [B, V] of items 1 to V; loss, the mean cross-entropy; and by their paths, joined with
    slashes, parameters as parameter/PATH and their gradients as gradient/PATH. No dropout.
    """
    given = dict(np.load(path))
    state, gradient = (
        torch_layout({p.removeprefix(kind): x for p, x in given.items() if p.startswith(kind)})
        for kind in ('parameter/', 'gradient/')
    )
    num_heads, _, num_experts = given['parameter/facet_block/router'].shape
    blocks = {name.split('.')[1] for name in state if name.startswith('blocks.')}
    tokens, targets = torch.from_numpy(given['tokens']), torch.from_numpy(given['targets'])
    differences = {}
    for form in FORMS:
        model = Fame(
            num_items=len(state['items.weight']) - 1,
            max_len=tokens.shape[1],
            width=state['items.weight'].shape[1],
            num_blocks=len(blocks) + 1,
            num_heads=num_heads,
            num_experts=num_experts,
            dropout=0.0,
            temperature=float(given['temperature']),
            last_only=form == 'last_only',
        )
        model.load_state_dict(state)
        score = model(tokens)
        loss = F.cross_entropy(score, targets - 1)
        loss.backward()
        query = model.query(tokens).detach().numpy()
        differences[form] = {
            'query': float(np.abs(query - given['query']).max()),
            'score': float(np.abs(score.detach().numpy() - given['score']).max()),
            'loss': abs(loss.item() - float(given['loss'])),
            'gradient': gradient_difference(model, gradient),
        }
    return differences


def gradient_difference(model, gradient):
    """The largest difference of any parameter's gradient, in units of its largest entry.

    The gradient of a key's bias is zero but for rounding: units are of no less than a hundredth
    of the largest gradient of all.
    """
    largest = max(float(x.abs().max()) for x in gradient.values())
    return max(
        float((p.grad - gradient[name]).abs().max())
        / max(float(gradient[name].abs().max()), largest / 100)
        for name, p in model.named_parameters()
    )


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.parity:
        differences = parity(args.parity)
        print(json.dumps(differences, indent=2))
        raise SystemExit(max(max(of.values()) for of in differences.values()) > TOLERANCE)
    serve_turns(*prepare(args))


if __name__ == '__main__':
    main()
