"""Ranks all users by one model, with programs that are compiled once."""

from collections.abc import Mapping
from concurrent.futures import Executor, Future
from typing import Any

import jax

from fame_jax.evaluation import metrics, ranking
from fame_jax.parallel.mesh import item_sharding

Array = jax.Array
Tree = Any


class Ranker:
    """Ranks the users of each split by parameters of one model.

    A split here is any set of users with a target each: those of validation and test, or a sample.
    A program is compiled for each shape of evaluation batches: ahead by `precompile`, or when a
    split is ranked for the first time.
    """

    def __init__(
        self,
        module: Any,
        params_like: Tree,
        eval_batches: Mapping[str, Any],
    ):
        """Stores the arguments; nothing is compiled yet.

        Args:
          module: an `ItemModel`, with its mesh.
          params_like: the module's parameters as `jax.ShapeDtypeStruct`s with shardings, of
            `parallel.mesh.abstract`.
          eval_batches: split -> its users as `data.eval_batches.EvalBatches`.
        """
        self._module, self._params_like = module, params_like
        self._eval_batches = eval_batches
        self._precompiled: set[str] = set()  # splits
        self._programs: dict[ranking.Rows, Future] = {}

        def encode(params: Tree, *rows: Array) -> Array:
            return module.apply({'params': params}, *rows, last=True)[0]

        def item_vectors(params: Tree) -> Array:
            return module.apply({'params': params}, method='item_vectors')

        self._encode = encode
        self._item_vectors = jax.jit(item_vectors, out_shardings=item_sharding(module.mesh))

    def __call__(self, params: Tree, split: str) -> ranking.Ranks:
        """The rank of each user's target in a split, in the order of its users.

        Args:
          params: parameters of the module.
          split: a key of `eval_batches`.

        Raises:
          FloatingPointError: when a score is NaN.
        """
        self.precompile(split)
        batches = self._eval_batches[split]
        return ranking.rank_users(
            self._encode,
            params,
            self._item_vectors(params),
            batches,
            batches.num_users,
            self._module.combine,
            num_items=self._module.num_items,
            mesh=self._module.mesh,
            programs=self._programs,
        )

    def precompile(self, split: str, executor: Executor | None = None) -> None:
        """Traces the programs of a split that earlier splits have not needed, and compiles them.

        Args:
          split: a key of `eval_batches`.
          executor: where XLA compiles; None: here and now.
        """
        if split in self._precompiled:
            return
        item_VD = jax.ShapeDtypeStruct.update(
            jax.eval_shape(self._item_vectors, self._params_like),
            sharding=item_sharding(self._module.mesh),
        )
        ranking.compile_ranking(
            self._programs,
            self._encode,
            self._params_like,
            item_VD,
            self._eval_batches[split].one_of_each_shape(),
            self._module.combine,
            num_items=self._module.num_items,
            mesh=self._module.mesh,
            executor=executor,
        )
        self._precompiled.add(split)

    def metrics(self, params: Tree, split: str = 'validation') -> dict[str, float]:
        """The metrics of a split, by one of which epochs are selected.

        Returns:
          The masked metrics by their names, and the unmasked ones as 'unmasked/ndcg@20' etc.

        Raises:
          FloatingPointError: when a score is NaN.
        """
        ranks = self(params, split)
        return {
            metrics.log_name(name, protocol): value
            for protocol in metrics.PROTOCOLS
            for name, value in metrics.metrics(getattr(ranks, protocol)).items()
        }
