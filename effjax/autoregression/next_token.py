"""Sampling token by token, row by row (LlamaGen, arXiv 2406.06525): one call for each token.

    z_0 = model(condition)                            what the sequence begins with
    for i in 1 ... N - 1:
        z_i = model(token i - 1)                      all before it is in a KV cache
        z = z_uncond + guidance (z_cond - z_uncond)
        token i = draw(top_p(top_k(z / temperature)))

Guidance 1 means none. With a `guidance_interval` n only the first n tokens are guided, and those
after them are drawn from the conditional branch.

All calls are one program: the first one reads the condition, the others are a scan. The forward's
patches say how keys and values are kept, as for language models; without one they are dense.

FLOPs of an image, with d layers of width C, MLPs of width F, b branches of guidance, T tokens of
the condition and N of the image: 2 b (T + N - 1) d (4 C^2 + 3 C F) for linear layers,
4 b C d (T^2 + (N - 1) (T + N - 1)) for attention to all slots of a dense cache, and 2 b N C V for
the head. Kernels leave out slots that are not filled yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.autoregression.drafted import drafted, on_grid
from effjax.context import PyTree, Step, is_static
from effjax.executables import Program
from effjax.finite import token_or_none
from effjax.forward import Forward, Params, StateDict
from effjax.generate import JacobiDecoding, Sampling, process_logits
from effjax.generate.installed import cached as with_cache
from effjax.generate.installed import check_shortest, check_tokens_alone, empty_state
from effjax.guidance import Guidance
from effjax.loops import Carry, Loop
from effjax.models.chameleon import ChameleonConfig
from effjax.models.janus import JanusConfig
from effjax.models.llamagen import LlamaGenConfig, condition_tokens, positions_of
from effjax.models.vq_model import VQModelConfig, latents_of
from effjax.samplers import sample_keys
from effjax.transform import Pair

DATA = ("vae", "guidance", "guidance_interval", "top_p", "temperature", "ids")
STATIC = ("grid", "top_k", "decoder", "known")

Tokens = Int[Array, "B N"]


@partial(jax.tree_util.register_dataclass, data_fields=DATA, meta_fields=STATIC)
@dataclasses.dataclass(frozen=True, eq=False)
class NextToken(Loop):
    """The loop that samples the tokens of an image one after the other, row by row.

    `jax.jit(loop)(forward, params, labels, key)` gives the latents of images, float32[B, rows,
    columns, Z]. Numbers that are data (guidance and its interval, top_p, temperature) do not
    compile again where the loop is an argument of a program.

    Attributes:
        vae: forward and parameters of the VQ model whose codes the model predicts.
        grid: rows and columns of tokens, those of the model.
        guidance: of classifier-free guidance; None for none, which halves the cost.
        guidance_interval: how many of the first tokens are guided; None for all.
        top_k: draw among the k likeliest tokens, and those as likely as the last; None for all.
        top_p: draw among the likeliest tokens whose probabilities reach this sum; None for all.
        temperature: divides the logits; None for 1.
        decoder: how several tokens are found in one call; None finds one. The distribution of
            images is the same. Costs and searches drive the calls of one token.
        ids: int32[V], the model's token of each code, where the vocabulary holds others too: its
            `image_ids`. Logits of others are left out.
        known: how many tokens the first call reads behind the condition, see `after`.
    """

    counted_by: ClassVar[str | None] = (
        "reference"  # others' steps follow from lengths, which are data
    )

    vae: Pair
    grid: tuple[int, int]
    guidance: float | Array | None = None
    guidance_interval: int | Array | None = None
    top_k: int | None = None
    top_p: float | Array | None = None
    temperature: float | Array | None = None
    decoder: JacobiDecoding | None = None
    ids: Int[Array, " V"] | None = None
    known: int = 0

    @property
    def tokens_of_image(self) -> int:
        """Number of tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def new_tokens(self) -> int:
        """Those of them that are drawn."""
        return self.tokens_of_image

    @property
    def calls(self) -> int:
        """Number of calls: one for each token."""
        return self.tokens_of_image

    @property
    def apart(self) -> tuple[int, ...]:
        return (0,)

    def alike(self, step: int) -> Hashable:
        return min(step, 1)

    @property
    def joined(self) -> Guidance | None:
        return None if self.guidance is None else Guidance()

    @property
    def guided(self) -> bool:
        """True if every call runs both branches."""
        return self.guidance is not None

    def unconditional(self, forward: Forward, cond: PyTree, uncond: PyTree = None) -> PyTree:
        if not self.guided:
            return None
        return forward.config.null_condition(cond) if uncond is None else uncond

    def __call__(
        self, forward: Forward, params: Params, cond: PyTree, key: Array, *, uncond: PyTree = None
    ) -> Float[Array, "B Y X Z"]:
        """Sample latents.

        Args:
            forward: the network, possibly patched.
            params: its parameters.
            cond: labels int32[B], captions, or prompts.
            key: one key, or keys [B]. Sample i depends on the key and on i, not on how many
                samples there are; what is drawn for a token does not depend on what was for others.
            uncond: the unconditional counterpart; the model's null condition if None.
        """
        return self.sample(forward, params, cond, key, uncond=uncond)[0]

    def sample(
        self, forward: Forward, params: Params, cond: PyTree, key: Array, *, uncond: PyTree = None
    ) -> tuple[Float[Array, "B Y X Z"], Tokens]:
        """Sample latents, and the tokens that they stand for."""
        tokens = self.tokens(forward, params, cond, key, uncond=uncond)[0]
        return latents_of(*self.vae, tokens, self.grid), tokens

    def tokens(
        self, forward: Forward, params: Params, cond: PyTree, key: Array, *, uncond: PyTree = None
    ) -> tuple[Tokens, Int[Array, " B"]]:
        """Sample tokens, and say how many network calls each image took."""
        carry = self.init(forward, params, cond, key, uncond=uncond)
        if self.decoder is None:
            tokens = self.run(forward, params, carry, cond, uncond).x
            return tokens, jnp.full(tokens.shape[0], self.calls)
        uncond = self.unconditional(forward, cond, uncond)
        made = drafted(self, self.decoder, forward, params, carry, cond, uncond)
        return jnp.where(made.finite[:, None], made.tokens, -1), made.calls

    def after(
        self,
        forward: Forward,
        params: Params,
        tokens: Tokens,
        cond: PyTree,
        key: Array,
        *,
        uncond: PyTree = None,
        stop: int | None = None,
    ) -> Carry:
        """Sample what follows given tokens, which are read in the first call, one token a call.

        Args:
            tokens: the first ones of each image; none of them, [B, 0], to begin at the first.
            stop: the token before which to stop; all are sampled if None.

        Raises:
            ValueError: if nothing is left to sample.
        """
        stop, given = self.calls if stop is None else stop, tokens.shape[1]
        if not given < stop <= self.calls:
            raise ValueError(
                f"{given} tokens are given, and sampling stops before token {stop} of "
                f"{self.calls}: nothing is left to sample"
            )
        loop = dataclasses.replace(self, known=given)
        carry = loop.init(forward, params, cond, key, uncond=uncond)
        uncond = loop.unconditional(forward, cond, uncond)
        if not given:
            return loop.run(forward, params, carry, cond, uncond, stop=stop)
        inputs = loop.reading(tokens, cond, uncond, None)
        ready = loop.cached(forward, condition_tokens(cond))
        raw, state = ready(params, carry.state, *inputs, step=0, guidance=loop.joined)
        x = jax.lax.dynamic_update_slice_in_dim(carry.x, tokens, 0, axis=1)
        out, carry = loop.output(raw, x, given), carry._replace(x=x, state=state)
        carry = loop.update(carry, out, jnp.int32(given))
        return loop.run(forward, params, carry, cond, uncond, start=given + 1, stop=stop)

    def stepwise(
        self,
        forward: Forward,
        params: Params,
        cond: PyTree,
        key: Array,
        *,
        uncond: PyTree = None,
        watch: Callable[[int, Sequence[StateDict]], Any] | None = None,
        progress: bool = False,
    ) -> tuple[Float[Array, "B Y X Z"], Tokens]:
        """The same, one token in each call, in a loop on the host of two programs.

        Args:
            watch: called as `watch(token, [state])` after every token; the next one overwrites it.
            progress: show a bar over the tokens.
        """
        from tqdm.auto import tqdm

        uncond = self.unconditional(forward, cond, uncond)
        x, _, state, keys = _compiled_init(self, forward, params, cond, key, uncond)
        for token in tqdm(range(self.calls), desc="tokens", disable=not progress):
            step = {} if token == 0 else {"step": jnp.int32(token)}
            inputs = self, forward, params, cond, uncond, x, keys
            x, _, state, keys = _compiled_step(*inputs, state=state, **step)
            if watch is not None:
                watch(token, [state])
        return latents_of(*self.vae, x, self.grid), x

    def init(
        self,
        forward: Forward,
        params: Params,
        cond: PyTree,
        key: Any = None,
        *,
        uncond: PyTree = None,
    ) -> Carry:
        """No tokens, empty caches and the keys.

        Raises:
            ValueError: if model and VQ model do not belong together, for a `top_k` above the number
                of codes, for prompts that are too long, and for methods that do not apply.
        """
        self.check(forward)
        self.unconditional(forward, cond, uncond)
        forward.check_calls(self.calls)
        condition, longest = self.read_at_once(cond), forward.config.max_length
        if condition + self.new_tokens > longest:
            raise ValueError(
                f"a prompt of {condition} tokens, padding included, and an image of "
                f"{self.new_tokens} are more than the {longest} that this model was made for: "
                f"shorten the prompt to {longest - self.new_tokens}"
            )
        ready = self.cached(forward, condition)
        batch = jax.tree.leaves(cond)[0].shape[0]
        rows = batch if self.joined is None else len(self.joined.branches) * batch
        state = empty_state(ready, params, rows)
        if forward.patches:
            check_shortest(ready, condition + self.new_tokens - 1)
            check_tokens_alone(ready, params, state, condition)
        tokens = jnp.zeros((batch, self.tokens_of_image), jnp.int32)
        return Carry(
            tokens, (), state, sample_keys(jax.random.key(0) if key is None else key, batch)
        )

    def check(self, forward: Forward) -> None:
        """Raise what `init` raises of the loop and the model."""
        self.check_order(forward)
        config, codes = forward.config, self.vae[0].config
        kinds = LlamaGenConfig | ChameleonConfig | JanusConfig
        if not isinstance(config, kinds) or not isinstance(codes, VQModelConfig):
            raise ValueError(
                f"tokens are sampled of a LlamaGen, a Chameleon or a Janus with its VQModel, got "
                f"{forward.model.__name__} and {self.vae[0].model.__name__}"
            )
        known, ids = config.vocab_size, ids_of(config)
        if ids is not None:
            known = len(ids)
            if self.ids is None or self.ids.shape != (known,):
                raise ValueError(
                    f"this model has {known} codes among its tokens: give "
                    f"ids=jnp.asarray(forward.config.image_ids)"
                )
        if self.grid != (own := (config.image_tokens // config.grid, config.grid)):
            raise ValueError(
                f"the model has {own[0]} rows and {own[1]} columns of tokens, and the loop is for "
                f"{self.grid}: give grid={own}"
            )
        if codes.vocab_size != known:
            raise ValueError(
                f"the VQ model has {codes.vocab_size} codes, and the model predicts {known}: they "
                f"belong to different models"
            )
        if self.top_k is not None and not 1 <= self.top_k <= known:
            raise ValueError(
                f"top_k must be 1 ... {known}, the number of codes, or None for all; "
                f"got {self.top_k}"
            )
        if self.decoder is not None:
            on_grid(self.decoder, self.grid)

    def check_order(self, forward: Forward) -> None:
        """Raise ValueError for a model that predicts tokens in another order."""
        if hasattr(forward.config, "groups"):
            raise ValueError(
                f"a {forward.model.__name__} predicts several tokens in a call: sample it with "
                f"NextDiagonal (NAR) or NextBlock (NBP)"
            )

    @staticmethod
    def logits(
        forward: Forward, params: Params, tokens: Tokens, cond: PyTree
    ) -> Float[Array, "B N V"]:
        """Logits of given tokens, see `logits_of`."""
        return logits_of(forward, params, tokens, cond)

    def inputs(self, x: Tokens, cond: PyTree, uncond: PyTree, step: Step) -> tuple[PyTree, ...]:
        """The condition in the first call, the last token in others; positions, and the column."""
        if is_static(step) and int(step) == 0:
            return self.reading(None, cond, uncond, None)
        token = jax.lax.dynamic_slice_in_dim(x, step - 1, 1, axis=1)
        return self.reading(token, cond, uncond, step - 1)

    def reading(
        self, tokens: Tokens | None, cond: PyTree, uncond: PyTree, start: Step | None
    ) -> tuple[PyTree, ...]:
        """Inputs of a call that reads codes, and gives the logits of the one after them.

        Args:
            tokens: the codes; None for the condition alone.
            cond, uncond: conditions.
            start: number of the first code; None for 0, behind the condition in the same call.
        """
        condition = condition_tokens(cond)
        count = 0 if tokens is None else tokens.shape[1]
        count, begin = (condition + count, 0) if start is None else (count, condition + start)
        if tokens is not None and self.ids is not None:
            tokens = self.ids[tokens]
        total = condition + self.calls
        positions = positions_of(cond, begin, count, total)
        if self.joined is not None:
            away = positions_of(uncond, begin, count, total)
            positions = self.joined.join({"cond": positions, "uncond": away})
            tokens = None if tokens is None else self.joined.duplicate(tokens)
            cond = self.joined.join({"cond": cond, "uncond": uncond})
        last = jnp.full((positions.shape[0], 1), count - 1)
        if start is not None:
            return (tokens, positions, last)
        if self.ids is not None:  # the condition's tokens are of the same vocabulary
            given = (cond.tokens,) if tokens is None else (cond.tokens, tokens)
            return (jnp.concatenate(given, axis=1), positions, last)
        return (tokens, positions, last, None, None, cond)

    def whole(self, carry: Carry, cond: PyTree, uncond: PyTree) -> tuple[PyTree, ...]:
        tokens, positions, _, *others = self.reading(carry.x[:, :-1], cond, uncond, None)
        return (tokens, positions, None, *others)

    def output(
        self, raw: Float[Array, "R T V"], x: Tokens, step: Step | Int[Array, "B T"]
    ) -> Float[Array, "B T C"]:
        """The guided logits of tokens, those of codes; `step` is as for `guide`."""
        return self.guide(raw if self.ids is None else raw[..., self.ids], step)

    def guide(
        self, raw: Float[Array, "R T V"], step: Step | Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """The guided logits uncond + guidance (cond - uncond), or cond after the interval.

        Args:
            raw: logits of both branches.
            step: number of the (first) token that they are of, or of each [B, T].
        """
        if self.joined is None:
            return raw
        parts = self.joined.split(raw.astype(jnp.float32))
        scale = jnp.asarray(self.guidance, jnp.float32)
        guided = parts["uncond"] + scale * (parts["cond"] - parts["uncond"])
        if self.guidance_interval is None:
            return guided
        numbers = jnp.asarray(step)
        numbers = numbers if numbers.ndim else numbers + jnp.arange(raw.shape[1])
        return jnp.where(numbers[..., None] < self.guidance_interval, guided, parts["cond"])

    def log_probs(self, out: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
        """Log-probabilities that tokens are drawn by, from guided logits; -inf where never."""
        return process_logits(out, Sampling(self.temperature, self.top_k, self.top_p))

    def update(self, carry: Carry, out: Float[Array, "B 1 V"], step: Step) -> Carry:
        """Draw a token."""
        keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(carry.keys)
        drawn = self.draw(keys, self.log_probs(out))
        return carry._replace(x=jax.lax.dynamic_update_slice_in_dim(carry.x, drawn, step, axis=1))

    def draw(self, keys: Array, logits: Float[Array, "B 1 V"]) -> Int[Array, "B 1"]:
        """Tokens of images, from log-probabilities."""
        drawn = jax.vmap(jax.random.categorical)(keys, logits[:, 0])
        return token_or_none(drawn.astype(jnp.int32)[:, None], logits)

    def ready(self, forward: Forward, cond: PyTree = None) -> Forward:
        return self.cached(forward, self.read_at_once(cond))

    def read_at_once(self, cond: PyTree) -> int:
        """Tokens of the first call: those of the condition, padding included."""
        return condition_tokens(cond)

    def cached(self, forward: Forward, condition: int) -> Forward:
        """The forward with a cache for a condition of so many tokens and an image."""
        first, others = condition + self.known, self.calls - 1 - self.known
        return with_cache(forward).with_cache_length(first, others)


def ids_of(config: Any) -> Int[Array, " V"] | None:
    """The model's token of each code, for the field `ids`; None where codes are its tokens."""
    if not isinstance(config, ChameleonConfig):
        return None
    return jnp.asarray(config.image_ids, jnp.int32)


@Program
def _compiled_init(
    loop: NextToken, forward: Forward, params: Params, cond: PyTree, key: Array, uncond: PyTree
) -> Carry:
    return loop.init(forward, params, cond, key, uncond=uncond)


@partial(Program, donate_argnames=("state",))
def _compiled_step(
    loop: NextToken,
    forward: Forward,
    params: Params,
    cond: PyTree,
    uncond: PyTree,
    x: Array,
    keys: Array,
    *,
    state: StateDict,
    step: Step = 0,
) -> Carry:
    step = 0 if is_static(step) else step
    return loop.step(forward, params, Carry(x, (), state, keys), cond, uncond, step)


def logits_of(
    forward: Forward, params: Params, tokens: Tokens, cond: PyTree
) -> Float[Array, "B N V"]:
    """Logits of given tokens, all in one call (teacher forcing), without guidance.

    Args:
        forward: the model without caches.
        params: its parameters.
        tokens: the first ones of an image, or all.
        cond: labels, captions or prompts.
    """
    first = condition_tokens(cond) - 1
    columns = jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)
    if (ids := ids_of(forward.config)) is not None:
        whole = jnp.concatenate([cond.tokens, ids[tokens[:, :-1]]], axis=1)
        positions = positions_of(cond, 0, whole.shape[1], whole.shape[1])
        return forward(params, {}, whole, positions, columns)[0][..., ids]
    return forward(params, {}, tokens[:, :-1], None, columns, None, None, cond)[0]
