"""What serving is timed on: models of random parameters over random items, and their contenders."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import config as config_lib
from fame_jax import evaluate, serve, serving
from fame_jax.data import pipeline
from fame_jax.models.build import build, initial

RECIPE = {'width': 64, 'num_blocks': 2, 'num_heads': 2, 'num_experts': 8, 'max_length': 50}
MODELS = {'fame': 'FAME', 'sasrec': 'SASRec'}
TOP_K = 20
# Toys: such a share of its 19,412 users did at most so much (mean 8.6).
SHARES = (0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.999, 1)
LENGTHS = (5, 5, 6, 7, 8, 10, 11, 14, 20, 28, 40, 89, 550)


def histories(count, num_items, seed=0):
    """Histories of random items, as outside ids, as long as those of Toys."""
    rng = np.random.default_rng(seed)
    lengths = np.interp(rng.random(count), SHARES, LENGTHS).astype(int)
    return [[str(item) for item in rng.integers(1, num_items + 1, n)] for n in lengths.tolist()]


def recommender(model, num_items):
    """A Recommender of a model with random parameters and random items."""
    config = config_lib.Config(model=model, **RECIPE)
    module = build(model, config, num_items)
    params = initial(module, jax.random.key(0))
    ids = ['', *map(str, range(1, num_items + 1))]
    served = serving.model_of(module, params, config.max_length)
    return serve.Recommender(served, ids, np.ones(num_items + 1, int), card={'model': model})


@partial(jax.jit, static_argnums=0)
def encode(encode, params, rows):
    """query_BQD."""
    return encode(params, *rows)


@partial(jax.jit, static_argnums=(0, 1))
def scores(encode, combine, params, item_VD, rows):
    """score_BV as evaluate.rank_users comes to it."""
    return evaluate.scores(encode(params, *rows), item_VD, combine)


@partial(jax.jit, static_argnums=2)
def search(query_BD, item_VD, top_k):
    """The top-k of queries that are given."""
    score_BV = jnp.einsum('BD,VD->BV', query_BD, item_VD, preferred_element_type=jnp.float32)
    score_BK, item_BK = jax.lax.top_k(score_BV.at[:, 0].set(-jnp.inf), top_k)
    return item_BK, score_BK


wait = jax.block_until_ready


class Bench:
    """A catalogue with its models and histories, and what is timed on them."""

    def __init__(self, num_items, batch):
        self.num_items = num_items
        self.recommenders = {name: recommender(name, num_items) for name in MODELS}
        self.models = {name: one.model for name, one in self.recommenders.items()}
        self.histories = histories(batch, num_items)
        # As recommend_all takes them.
        self.chunk = min(self.recommenders['fame'].batch, 1 << (batch - 1).bit_length())
        self.allowed_V = jnp.arange(num_items + 1) > 0
        self.ones = [_on_device(self.rows([history], 1)[0]) for history in self.histories]
        self.many = [_on_device(held) for held in self.rows(self.histories, self.chunk)]
        self.query_BD = self._queries()
        self.queries = [jnp.asarray(query_D[None]) for query_D in self.query_BD]
        starts = range(0, batch, self.chunk)
        self.query_chunks = [jnp.asarray(self.query_BD[s : s + self.chunk]) for s in starts]
        self.index = _faiss_index(self.models['fame'].item_VD)

    def rows(self, several, size):
        """What Python does before the device has anything to do: so many histories in a chunk."""
        items = [self.recommenders['fame'].numbers(history)[0] for history in several]
        offsets = np.cumsum([0, *map(len, items)])
        targets = np.ones(len(items), np.int32)
        max_length = RECIPE['max_length']
        return list(pipeline.held_rows(np.concatenate(items), offsets, targets, max_length, size))

    def _queries(self):
        """FAME's query of each history, float32 [B, D] in memory."""
        query_BD = np.zeros((len(self.histories), RECIPE['width']), np.float32)
        for held in self.many:
            real = held.target_B > 0
            query_BD[held.user_B[real]] = np.asarray(self.encode('fame', held))[real, 0]
        return query_BD

    def encode(self, name, held):
        """query_BQD of a chunk."""
        model = self.models[name]
        return wait(encode(model.encode, model.params, tuple(held[:3])))

    def scores(self, name, held):
        """score_BV of a chunk."""
        model = self.models[name]
        arguments = model.params, model.item_VD, tuple(held[:3])
        return wait(scores(model.encode, model.combine, *arguments))

    def best(self, name, held):
        """What serving asks of the device, of a chunk."""
        model = self.models[name]
        arguments = model.params, model.item_VD, tuple(held[:3]), held.seen_BS, self.allowed_V
        return wait(serve.best(model.encode, model.combine, TOP_K, *arguments))

    def search(self, query_BD):
        """The top-k of queries, of FAME's items."""
        return wait(search(query_BD, self.models['fame'].item_VD, TOP_K))

    def answer(self, name, i):
        """One history, as a user asks for it."""
        return self.recommenders[name].recommend(self.histories[i], TOP_K)

    def answer_all(self, name, _):
        """All of them."""
        return list(self.recommenders[name].recommend_all(self.histories, TOP_K))

    def one(self):
        """Name -> what answers history i."""
        found = {'rows': lambda i: self.rows([self.histories[i]], 1)}
        for name, title in MODELS.items():
            found[title] = partial(self.answer, name)
            for part, ask in self._parts().items():
                found[f'{title} {part}'] = lambda i, ask=ask, name=name: ask(name, self.ones[i])
        found['query given'] = lambda i: self.search(self.queries[i])
        if self.index:
            found['FAISS'] = lambda i: self.index.search(self.query_BD[i : i + 1], TOP_K)
        return found

    def together(self):
        """Name -> what answers all histories, whatever i is."""
        found = {'rows': lambda _: self.rows(self.histories, self.chunk)}
        for name, title in MODELS.items():
            found[title] = partial(self.answer_all, name)
            for part, ask in self._parts().items():
                found[f'{title} {part}'] = lambda _, ask=ask, name=name: [
                    ask(name, held) for held in self.many
                ]
        found['query given'] = lambda _: [self.search(query_BD) for query_BD in self.query_chunks]
        if self.index:
            found['FAISS'] = lambda _: self.index.search(self.query_BD, TOP_K)
        return found

    def _parts(self):
        return {'on the device': self.best, 'encode': self.encode, 'scores': self.scores}

    def agreement(self):
        """The share of a hundred queries whose top-k FAISS and we have alike, as sets; or None."""
        if not self.index:
            return None
        query_BD = self.query_BD[:100]
        ours_BK = np.asarray(self.search(jnp.asarray(query_BD))[0])
        theirs_BK = self.index.search(query_BD, TOP_K)[1] + 1
        return float(np.mean([set(a) == set(b) for a, b in zip(ours_BK, theirs_BK)]))

    def one_of_each_shape(self):
        """Histories that have every program compiled."""
        shapes = [(held.tokens_BL.shape, held.seen_BS.shape) for held in self.ones]
        return [shapes.index(shape) for shape in sorted(set(shapes))]


def _on_device(held):
    names = ('tokens_BL', 'positions_BL', 'segments_BL', 'seen_BS')
    return held._replace(**{name: jnp.asarray(getattr(held, name)) for name in names})


def _faiss_index(item_VD):
    """FAISS over the items; None where it is not installed."""
    if importlib.util.find_spec('faiss') is None:
        return None
    import faiss

    index = faiss.IndexFlatIP(item_VD.shape[1])
    index.add(np.array(item_VD[1:], np.float32))
    return index
