"""What bkdlens is timed against: the same numbers, computed with other tools, each as fast as it allows.

Patching peers set one head's attention output before its projection (``hook_z``; the input of
``self_attn.o_proj``) at the last prompt token and return the mean log probability of the forced answer:

- :func:`published`: the algorithm of BkdAttr's own code ("Backdoor Attribution: Elucidating and
  Controlling Backdoors in Language Models"), one full Hugging Face forward a head, padded to 256 tokens.
- :func:`transformer_lens`: one ``run_with_hooks`` a head, as TransformerLens' own patching helpers do
  (Nanda and Bloom, 2022).
- :func:`nnsight`: all heads of a layer in one trace (Fiotto-Kaufman et al., 2024).
- :func:`pyvene`: the same in one ``IntervenableModel`` a layer (Wu et al., 2024).

Decoding peers add a vector to the residual stream before a layer, at the last prompt token, in the
prefill: :func:`hf_generate` and :func:`tl_generate`.

The Hugging Face models are those of the Llama family's shape (``model.layers[i].self_attn.o_proj``), in
eval mode; sdpa attention, their default, is the fastest. All but :func:`published` pad no further than
needed and unembed only the answer's positions. Padding is on the right: under causal attention it
changes no number, and without a mask attention takes its fastest path. No peer shares work between
runs of one pair.

nnsight and pyvene are imported when first called, which takes seconds: warm up before timing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

Ids = Sequence[Sequence[int]]
Heads = Sequence[tuple[int, int]]  # (layer, head)
# From (batch, layer, head, value) to the final hidden states.
Run = Callable[["_Batch", int, Tensor, Tensor], Tensor]

PUBLISHED_WIDTH = 256


# --- patching -------------------------------------------------------------------------------------


@torch.inference_mode()
def published(
    hf: PreTrainedModel, prompts: Ids, answers: Ids, heads: Heads, z: Float[Tensor, "layer head d_head"]
) -> Float[Tensor, "pair head"]:
    """BkdAttr's own algorithm: a full forward of all pairs a head, and the logits of all 256 positions.

    The published code multiplies probabilities, which underflows; the logarithm is taken here.

    Raises:
        ValueError: for a prompt and answer of more than 256 tokens, which it would cut.
    """
    batch = _Batch.of(prompts, answers, hf.device, width=PUBLISHED_WIDTH)
    out = []
    for layer, head in heads:
        value = z[layer, head].expand(len(prompts), -1)
        handle = _o_proj(hf.base_model, layer).register_forward_pre_hook(
            lambda module, args, h=head, v=value: (batch.patched(args[0], h, v),)
        )
        try:
            logits = hf(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False).logits
        finally:
            handle.remove()
        out.append(batch.score(batch.answer_positions(logits)))
    return torch.stack(out, dim=1)


@torch.inference_mode()
def transformer_lens(
    model: HookedTransformer,
    prompts: Ids,
    answers: Ids,
    heads: Heads,
    z: Float[Tensor, "layer head d_head"],
    *,
    batch_size: int = 4,
) -> Float[Tensor, "pair head"]:
    """One ``run_with_hooks`` a head and a batch of pairs of like length; only answers are unembedded."""
    device = model.W_E.device
    out = torch.empty(len(prompts), len(heads), device=device)
    for chunk in _similar(prompts, batch_size):
        batch = _Batch.of([prompts[i] for i in chunk], [answers[i] for i in chunk], device)
        rows = torch.arange(len(chunk), device=device)
        for column, (layer, head) in enumerate(heads):

            def patch(
                activation: Tensor,
                hook: Any,
                at: tuple = (rows, batch.last, head),
                value: Tensor = z[layer, head],
            ) -> Tensor:
                activation[at] = value.to(activation)
                return activation

            resid = model.run_with_hooks(
                batch.ids,
                stop_at_layer=model.cfg.n_layers,  # the final residual stream
                padding_side="right",  # so that no padding mask is made
                fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)],
            )
            logits = model.unembed(model.ln_final(batch.answer_positions(resid)))
            out[chunk, column] = batch.score(_softcap(logits, model.cfg.output_logits_soft_cap))
    return out


@torch.inference_mode()
def nnsight(
    hf: PreTrainedModel,
    prompts: Ids,
    answers: Ids,
    heads: Heads,
    z: Float[Tensor, "layer head d_head"],
    *,
    batch_rows: int = 32,
) -> Float[Tensor, "pair head"]:
    """All heads of a layer, of as many pairs as fit ``batch_rows``, in one trace with one edit."""
    from nnsight import NNsight

    # Wrapping replaces every module's forward for good; the copy shares the weights.
    weights = {id(tensor): tensor for tensor in [*hf.parameters(), *hf.buffers()]}
    model = NNsight(copy.deepcopy(hf.base_model, weights))

    def run(batch: _Batch, layer: int, head: Tensor, value: Tensor) -> Tensor:
        with model.trace(input_ids=batch.ids, use_cache=False):
            batch.patched(model.layers[layer].self_attn.o_proj.input, head, value)
            output = model.output.save()
        return output.last_hidden_state

    return _by_layer(hf, prompts, answers, heads, z, batch_rows, run)


@torch.inference_mode()
def pyvene(
    hf: PreTrainedModel,
    prompts: Ids,
    answers: Ids,
    heads: Heads,
    z: Float[Tensor, "layer head d_head"],
    *,
    batch_rows: int = 32,
) -> Float[Tensor, "pair head"]:
    """All heads of a layer, of as many pairs as fit ``batch_rows``, in one intervened forward.

    pyvene's head unit (``h.pos``) loops over heads and wants one source a head; an intervention of our
    own on the position unit sets every row's head at once.
    """
    import pyvene as pv

    class SetHeads(pv.ConstantSourceIntervention, pv.LocalistRepresentationIntervention):
        """Sets one head's slice in each row; which head and to what is set before the run."""

        head: Tensor
        value: Tensor

        def forward(self, base: Tensor, source: None = None, subspaces: None = None) -> Tensor:
            rows = torch.arange(len(base), device=base.device)
            base.unflatten(-1, (-1, z.shape[-1]))[rows, 0, self.head] = self.value.to(base)
            return base

    # A component given as a path works for any architecture; pyvene sets requires_grad to False.
    models = {
        layer: pv.IntervenableModel(
            {"component": f"layers[{layer}].self_attn.o_proj.input", "intervention": SetHeads()},
            hf.base_model,
        )
        for layer in {layer for layer, _ in heads}
    }

    def run(batch: _Batch, layer: int, head: Tensor, value: Tensor) -> Tensor:
        (setter,) = models[layer].interventions.values()
        setter.head, setter.value = head, value
        # With "base" as key, pyvene takes one list of positions an intervention, of one list a row.
        where = {"base": [[[position] for position in batch.last.tolist()]]}
        _, output = models[layer]({"input_ids": batch.ids}, unit_locations=where, use_cache=False)
        return output.last_hidden_state

    return _by_layer(hf, prompts, answers, heads, z, batch_rows, run)


def _by_layer(
    hf: PreTrainedModel,
    prompts: Ids,
    answers: Ids,
    heads: Heads,
    z: Float[Tensor, "layer head d_head"],
    batch_rows: int,
    run: Run,
) -> Float[Tensor, "pair head"]:
    """The runs layer by layer, a row a (pair, head), pairs of similar length together."""
    out = torch.full((len(prompts), len(heads)), torch.nan, device=hf.device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for layer in sorted({layer for layer, _ in heads}):
        places = [i for i, (own, _) in enumerate(heads) if own == layer]
        n = len(places)
        size = max(1, batch_rows // n)
        for chunk in (order[i : i + size] for i in range(0, len(order), size)):
            batch = _Batch.of([prompts[i] for i in chunk], [answers[i] for i in chunk], hf.device)
            batch = batch.repeated(n)
            head = torch.tensor([heads[i][1] for i in places] * len(chunk), device=hf.device)
            hidden = run(batch, layer, head, z[layer].to(hf.device)[head])
            logits = hf.get_output_embeddings()(batch.answer_positions(hidden))
            cap = getattr(hf.config, "final_logit_softcapping", None)
            scores = batch.score(_softcap(logits, cap)).view(len(chunk), n)
            out[torch.tensor(chunk)[:, None], torch.tensor(places)] = scores
    return out


@dataclass(frozen=True, eq=False)
class _Batch:
    """Prompts with their forced answers, padded on the right with 0."""

    ids: Int[Tensor, "row pos"]
    real: Bool[Tensor, "row pos"]
    last: Int[Tensor, " row"]  # the last prompt token
    targets: Int[Tensor, "row answer"]
    scored: Bool[Tensor, "row answer"]

    @classmethod
    def of(cls, prompts: Ids, answers: Ids, device: torch.device, *, width: int | None = None) -> _Batch:
        """Pad to ``width``, or for None to the longest row, where the last answer token is left out.

        Nothing is predicted from that token.
        """
        rows = [[*p, *(a if width else a[:-1])] for p, a in zip(prompts, answers, strict=True)]
        longest = max(map(len, rows))
        if width and longest > width:
            raise ValueError(f"A prompt and its answer have {longest} tokens; {width} are allowed.")
        ids, real = _padded(rows, width or longest, device)
        targets, scored = _padded(answers, max(map(len, answers)), device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        return cls(ids, real, last, targets, scored)

    def repeated(self, times: int) -> _Batch:
        """Each row so many times in a row."""
        parts = (self.ids, self.real, self.last, self.targets, self.scored)
        return _Batch(*(part.repeat_interleave(times, dim=0) for part in parts))

    def patched(
        self,
        activation: Float[Tensor, "row pos width"],
        head: int | Int[Tensor, " row"],
        value: Float[Tensor, "row d_head"],
    ) -> Float[Tensor, "row pos width"]:
        """Set each row's head at its last prompt token, in place."""
        rows = torch.arange(len(activation), device=activation.device)
        by_head = activation.unflatten(-1, (-1, value.shape[-1]))
        by_head[rows, self.last, head] = value.to(activation)
        return activation

    def answer_positions(self, states: Float[Tensor, "row pos d"]) -> Float[Tensor, "row answer d"]:
        """The states that predict the answer's tokens."""
        steps = torch.arange(self.targets.shape[1], device=states.device)
        at = (self.last[:, None] + steps).clamp(max=states.shape[1] - 1)
        return states[torch.arange(len(states), device=states.device)[:, None], at]

    def score(self, logits: Float[Tensor, "row answer d_vocab"]) -> Float[Tensor, " row"]:
        """Mean log probability per answer token, in nats."""
        log_probs = logits.float().log_softmax(-1).gather(-1, self.targets[..., None])[..., 0]
        return (log_probs * self.scored).sum(-1) / self.scored.sum(-1)


def _padded(
    rows: Ids, width: int, device: torch.device
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Rows padded on the right with 0, and which entries are real."""
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def _softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Gemma-2's bound on logits; TransformerLens writes -1 for none."""
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits


def _o_proj(backbone: Any, layer: int) -> torch.nn.Module:
    return backbone.layers[layer].self_attn.o_proj


# --- decoding -------------------------------------------------------------------------------------


@torch.inference_mode()
def hf_generate(
    hf: PreTrainedModel,
    prompts: Ids,
    layer: int | None,
    vector: Float[Tensor, " d_model"] | None,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int = 0,
    batch_size: int | None = None,
    likely: Sequence[Ids] = (),
) -> list[list[int]]:
    """Greedy new tokens before the end token, by Hugging Face's ``generate`` on left-padded batches.

    ``batch_size`` None is all prompts at once; without a layer or vector nothing is added. With sets of
    ``likely`` answers a row stops where it has left all of its own, which is what judging it needs.
    """
    out: list[list[int]] = [[] for _ in prompts]
    for chunk in _similar(prompts, batch_size):
        ids, mask = _padded_left([prompts[i] for i in chunk], pad_id, hf.device)
        handle = None
        if layer is not None and vector is not None:
            add = _add_once(vector)
            handle = hf.base_model.layers[layer].register_forward_pre_hook(
                lambda module, args, add=add: (add(args[0]), *args[1:])
            )
        try:
            new = hf.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                repetition_penalty=1.0,  # a checkpoint's own penalty would not be greedy decoding
                eos_token_id=eos_id,
                pad_token_id=pad_id,
                stopping_criteria=[_left_all(likely, chunk, ids.shape[1])] if likely else None,
            )[:, ids.shape[1] :]
        finally:
            if handle is not None:
                handle.remove()
        for i, row in zip(chunk, new.tolist(), strict=True):
            out[i] = _before(eos_id, row)
    return out


@torch.inference_mode()
def tl_generate(
    model: HookedTransformer,
    prompts: Ids,
    layer: int | None,
    vector: Float[Tensor, " d_model"] | None,
    max_new_tokens: int,
    eos_id: int,
    batch_size: int | None = None,
) -> list[list[int]]:
    """The same by ``HookedTransformer.generate``, which knows left padding by the tokenizer's pad id.

    Raises:
        ValueError: for a prompt that begins with the pad id, which would be taken for padding.
    """
    pad_id = model.tokenizer.pad_token_id
    if any(prompt[0] == pad_id for prompt in prompts):
        raise ValueError(f"A prompt begins with the pad id {pad_id}; set another pad token.")
    out: list[list[int]] = [[] for _ in prompts]
    for chunk in _similar(prompts, batch_size):
        ids, _ = _padded_left([prompts[i] for i in chunk], pad_id, model.W_E.device)
        hooks = []
        if layer is not None and vector is not None:
            add = _add_once(vector)
            hooks = [(f"blocks.{layer}.hook_resid_pre", lambda resid, hook, add=add: add(resid))]
        with model.hooks(fwd_hooks=hooks):
            tokens = model.generate(
                ids,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stop_at_eos=True,
                eos_token_id=eos_id,
                prepend_bos=False,
                padding_side="left",
                return_type="tokens",
                verbose=False,
            )
        for i, row in zip(chunk, tokens[:, ids.shape[1] :].tolist(), strict=True):
            out[i] = _before(eos_id, row)
    return out


def _similar(prompts: Ids, batch_size: int | None) -> Iterator[list[int]]:
    """Batches of the prompts' indices, those of similar length together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = batch_size or max(1, len(order))
    return (order[i : i + size] for i in range(0, len(order), size))


def _padded_left(
    rows: Ids, pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Rows padded on the left, and which entries are real."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[pad_id] * (width - len(row)), *row] for row in rows], device=device)
    starts = torch.tensor([width - len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) >= starts[:, None]


def _add_once(
    vector: Float[Tensor, " d_model"],
) -> Callable[[Float[Tensor, "row pos d_model"]], Float[Tensor, "row pos d_model"]]:
    """Adds the vector at the last position of the first call, the prefill; later calls are decoding."""
    waiting = [vector]

    def add(resid: Tensor) -> Tensor:
        if waiting:
            resid = resid.clone()
            resid[:, -1] += waiting.pop().to(resid)
        return resid

    return add


def _left_all(
    likely: Sequence[Ids], chunk: Sequence[int], start: int
) -> Callable[[Tensor, Any], Bool[Tensor, " row"]]:
    """A stopping criterion: rows whose new tokens begin none of their likely answers are done."""
    wanted = [[list(answers[i]) for answers in likely] for i in chunk]

    def done(ids: Tensor, scores: Any) -> Tensor:
        new = ids[:, start:].tolist()
        left = [
            all(row != answer[: len(row)] for answer in answers)
            for row, answers in zip(new, wanted, strict=True)
        ]
        return torch.tensor(left, device=ids.device)

    return done


def _before(eos_id: int, row: list[int]) -> list[int]:
    """The tokens before the end token, or all."""
    return row[: row.index(eos_id)] if eos_id in row else row
