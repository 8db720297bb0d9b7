# SPDX-License-Identifier: Apache-2.0
"""MEPT written down a second time, in float64 and with loops, to compare the package with.

Nothing here imports the package. A model is walked block by block; only its leaf modules are used (linear layers,
norms, embeddings, MLPs, the rotary table), while routing, masks, positions, softmax and attention are spelled out per
sample, query and head. The trained tensors are looked up by name in the base model, so gradients can be taken with
respect to the very parameters that the package trains.

Sample routing is the naive model: rows in front of the text, the whole block run on both, the first outputs dropped.
Token routing is the equation: one softmax per query over its text columns and the slots of the experts it chose.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.t5 import modeling_t5

ROUTER_NORM_EPS = 1e-6
IGNORED = -100


@dataclass(frozen=True)
class Mept:
    """The settings of one run, under the names of MEPTConfig."""

    num_experts: int
    top_k: int
    num_shared_experts: int
    routing: str
    num_virtual_tokens: int = 3
    renormalize_top_k: bool = False
    prompt_scale: float = 1.0
    decoder_sees_prompts: bool = True
    adapter: str = "default"


@dataclass(frozen=True)
class Batch:
    """One forward's inputs. `attention_mask` and `position_ids` are None where the model is called without them."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None

    def kwargs(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def real(self) -> Tensor:
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask


@dataclass(frozen=True)
class Slots:
    """The extra columns of one expert in one layer, for token routing: keys and values [B, P, heads, head_dim]."""

    key: Tensor
    value: Tensor
    positions: Tensor
    log_gate: dict[tuple[int, int], Tensor] | None
    """By sample and query; a pair that is not there is not routed to this expert. None: every query, at gate 1."""


def leaf(module: nn.Module, *args: Any) -> Tensor:
    # .forward and not a call: hooks that the package may have put on this module belong to its own forward only.
    return module.forward(*args)


def softmax(scores: Tensor) -> Tensor:
    weights = torch.exp(scores - scores.max().detach())
    return weights / weights.sum()


def log_softmax(scores: Tensor) -> Tensor:
    shifted = scores - scores.max().detach()
    return shifted - torch.log(torch.exp(shifted).sum())


def top_k_indices(scores: Tensor, k: int) -> list[int]:
    """The k largest, best first; a choice that rounding could flip would make any comparison meaningless."""
    values = scores.detach().tolist()
    order = sorted(range(len(values)), key=lambda e: -values[e])
    if k < len(order) and values[order[k - 1]] - values[order[k]] < 1e-7:
        raise AssertionError("tie at the top-k boundary: choose another seed")
    return order[:k]


def router_input(x: Tensor) -> Tensor:
    """The unit-gain RMS norm of one un-normed layer input [D]."""
    return x / torch.sqrt((x * x).mean() + ROUTER_NORM_EPS)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    visible: Callable[[int, int, int], bool],
    *,
    bias: Callable[[int, int, list[int]], Tensor] | None = None,
    slots: list[Slots] | None = None,
    slot_bias: Callable[[int, int, list[int]], Tensor] | None = None,
) -> Tensor:
    """Attention of query [B, Tq, heads, d] over key and value [B, Tk, kv_heads, d]; returns [B, Tq, heads * d].

    `visible(b, t, j)` says whether query t of sample b sees column j. `bias(b, t, columns)` and
    `slot_bias(b, t, positions)` give additive scores [columns, heads].
    """
    n_samples, n_queries, n_heads, head_dim = query.shape
    group = n_heads // key.shape[2]
    samples = []
    for b in range(n_samples):
        rows = []
        for t in range(n_queries):
            columns = [j for j in range(key.shape[1]) if visible(b, t, j)]
            chosen = [s for s in slots or [] if s.log_gate is None or (b, t) in s.log_gate]
            seen_key, seen_value = key[b, columns], value[b, columns]
            column_bias = bias(b, t, columns) if bias else None
            slot_biases = [slot_bias(b, t, s.positions[b].tolist()) if slot_bias else None for s in chosen]
            heads = []
            for h in range(n_heads):
                q, kv = query[b, t, h], h // group
                scores = scale * (seen_key[:, kv] @ q)
                if column_bias is not None:
                    scores = scores + column_bias[:, h]
                all_scores, all_values = [scores], [seen_value[:, kv]]
                for s, extra_bias in zip(chosen, slot_biases, strict=True):
                    scores = scale * (s.key[b, :, kv] @ q)
                    if extra_bias is not None:
                        scores = scores + extra_bias[:, h]
                    if s.log_gate is not None:
                        scores = scores + s.log_gate[b, t]
                    all_scores.append(scores)
                    all_values.append(s.value[b, :, kv])
                scores = torch.cat(all_scores)
                if len(scores) == 0:  # a pad in front of a causal text sees nothing, and nobody reads it
                    heads.append(q.new_zeros(head_dim))
                else:
                    heads.append(softmax(scores) @ torch.cat(all_values))
            rows.append(torch.cat(heads))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


class Oracle:
    """One base model, one batch, one setting. Subclasses say what a family's blocks look like."""

    causal = False
    pools_query_only = False
    has_relative_bias = False

    def __init__(self, model: nn.Module, batch: Batch, mept: Mept | None) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.batch = batch
        self.mept = mept
        self.tensors = dict(model.named_parameters())
        self.real: list[list[int]] = batch.real.tolist()
        self.n_samples, self.n_text = batch.input_ids.shape
        arange = torch.arange(self.n_text).expand(self.n_samples, -1)
        self.position_ids = arange if batch.position_ids is None else batch.position_ids
        self.first_real = [row.index(1) for row in self.real]

    # What a family defines

    def attention_path(self, i: int) -> str:
        raise NotImplementedError

    def layers(self) -> Any:
        raise NotImplementedError

    def embed(self) -> Tensor:
        raise NotImplementedError

    def pre_norm(self, i: int, x: Tensor) -> Tensor:
        return x

    def project(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of normed rows [B, T, D], each [B, T, heads, head_dim], before any rotation."""
        raise NotImplementedError

    def after_attention(self, i: int, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of block i, from the block's input and the heads' mixed values."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """Logits from the last block's output."""
        raise NotImplementedError

    def scale(self, i: int) -> float:
        raise NotImplementedError

    def rotate(self, i: int, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def window(self, i: int) -> int | None:
        return None

    def relative_bias(self, positions: list[int], query_position: int) -> Tensor:
        """Additive scores [positions, heads]; positions of text are columns here."""
        raise NotImplementedError

    def keeps_slots(self, i: int) -> bool:
        return False

    # What all families share

    def tensor(self, i: int, name: str) -> Tensor:
        assert self.mept is not None
        return self.tensors[f"{self.attention_path(i)}.promptmoe.{name}.{self.mept.adapter}.weight"]

    def rows(self, i: int) -> Tensor:
        assert self.mept is not None
        return self.mept.prompt_scale * self.tensor(i, "mept_prompts")

    def shared_rows(self, i: int) -> list[Tensor]:
        assert self.mept is not None
        n_shared = self.mept.num_shared_experts
        if n_shared == 0:
            return []
        weight = self.mept.prompt_scale * self.tensor(i, "mept_shared_prompts")
        assert len(weight) == n_shared
        return [weight[s] for s in range(n_shared)]

    def slot_positions(self) -> Tensor:
        """[B, P]: the slots end right before the sample's first real token."""
        assert self.mept is not None
        n_slots = self.mept.num_virtual_tokens
        starts = [int(self.position_ids[b, self.first_real[b]]) for b in range(self.n_samples)]
        return torch.tensor([[start + p - n_slots for p in range(n_slots)] for start in starts])

    def pooled_columns(self, b: int) -> list[int]:
        """The positions that the sample router reads."""
        real = [t for t in range(self.n_text) if self.real[b][t]]
        if not self.pools_query_only or self.batch.labels is None:
            return real
        query = []
        for t in real:
            if self.batch.labels[b, t] != IGNORED:
                break  # later masked spans are other turns, not the query
            query.append(t)
        return query

    def sample_rows(self, i: int, x: Tensor) -> Tensor:
        """[B, P, D]: for each sample the gated sum of its chosen experts, plus the shared experts."""
        assert self.mept is not None
        experts, batch_rows = self.rows(i), []
        for b in range(self.n_samples):
            if self.mept.num_experts == 1:
                rows = experts[0]
            else:
                pooled = self.pooled_columns(b)
                s = x.new_zeros(x.shape[-1])
                for t in pooled:
                    s = s + router_input(x[b, t])
                s = s / max(1, len(pooled))
                p = softmax(self.tensor(i, "mept_router") @ s)
                chosen = top_k_indices(p, self.mept.top_k)
                total = sum((p[e] for e in chosen), start=p.new_zeros(()))
                rows = torch.zeros_like(experts[0])
                for e in chosen:
                    rows = rows + (p[e] / total if self.mept.renormalize_top_k else p[e]) * experts[e]
            for shared in self.shared_rows(i):
                rows = rows + shared
            batch_rows.append(rows)
        return torch.stack(batch_rows)

    def token_gates(self, i: int, x: Tensor) -> list[dict[tuple[int, int], Tensor]]:
        """log g by expert, then by (sample, query); experts outside a query's top-k are absent there."""
        assert self.mept is not None
        gates: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(self.mept.num_experts)]
        for b in range(self.n_samples):
            for t in range(self.n_text):
                if self.mept.num_experts == 1:
                    gates[0][b, t] = x.new_zeros(())
                    continue
                u = self.tensor(i, "mept_router") @ router_input(x[b, t])
                log_p, chosen = log_softmax(u), top_k_indices(u, self.mept.top_k)
                kept = torch.log(sum((torch.exp(log_p[e]) for e in chosen), start=u.new_zeros(())))
                for e in chosen:
                    gates[e][b, t] = log_p[e] - kept if self.mept.renormalize_top_k else log_p[e]
        return gates

    def token_slots(self, i: int, x: Tensor) -> list[Slots]:
        positions, slots = self.slot_positions(), []
        gates: list[Any] = [*self.token_gates(i, x)]
        experts = [self.rows(i)[e] for e in range(len(gates))]
        for shared in self.shared_rows(i):
            experts.append(shared)
            gates.append(None)
        for rows, gate in zip(experts, gates, strict=True):
            # The same rows for every sample; only their rotation may differ, with where the sample's text begins.
            batch_rows = torch.stack([rows] * self.n_samples)
            _, key, value = self.project(i, self.pre_norm(i, batch_rows))
            slots.append(Slots(self.rotate(i, key, positions), value, positions, gate))
        return slots

    def block(self, i: int, x: Tensor, n_slots: int, slots: list[Slots]) -> Tensor:
        """The whole block i over x [B, n_slots + T, D], with the columns of `slots` besides."""
        positions = self.position_ids if n_slots == 0 else torch.cat([self.slot_positions(), self.position_ids], 1)

        def visible(b: int, query: int, column: int) -> bool:
            if column < n_slots:
                return not self.causal or column <= query
            text = column - n_slots
            if not self.real[b][text]:
                return False
            if not self.causal:
                return True
            window = self.window(i)
            distance = query - column
            return distance >= 0 and (window is None or distance < window)

        def bias(b: int, query: int, columns: list[int]) -> Tensor:
            return self.relative_bias([int(positions[b, j]) for j in columns], int(positions[b, query]))

        def slot_bias(b: int, query: int, slot_positions: list[int]) -> Tensor:
            return self.relative_bias(slot_positions, int(positions[b, query]))

        query, key, value = self.project(i, self.pre_norm(i, x))
        mixed = attend(
            self.rotate(i, query, positions),
            self.rotate(i, key, positions),
            value,
            self.scale(i),
            visible,
            bias=bias if self.has_relative_bias else None,
            slots=slots,
            slot_bias=slot_bias if self.has_relative_bias else None,
        )
        return self.after_attention(i, x, mixed)

    def run_blocks(self) -> Tensor:
        x = self.embed()
        for i in range(len(self.layers())):
            if self.mept is None:
                x = self.block(i, x, 0, [])
            elif self.mept.routing == "sample":
                n_slots = self.mept.num_virtual_tokens
                out = self.block(i, torch.cat([self.sample_rows(i, x), x], dim=1), n_slots, [])
                x = out if self.keeps_slots(i) else out[:, n_slots:]
            elif self.mept.routing == "token":
                x = self.block(i, x, 0, self.token_slots(i, x))
            else:
                raise ValueError(self.mept.routing)
        return x

    def logits(self) -> Tensor:
        return self.finish(self.run_blocks())


class BertOracle(Oracle):
    """BertForSequenceClassification: post-norm."""

    def attention_path(self, i: int) -> str:
        return f"bert.encoder.layer.{i}.attention.self"

    def layers(self) -> Any:
        return self.model.bert.encoder.layer

    def embed(self) -> Tensor:
        emb = self.model.bert.embeddings
        words = leaf(emb.word_embeddings, self.batch.input_ids)
        types = leaf(emb.token_type_embeddings, torch.zeros_like(self.batch.input_ids))
        return leaf(emb.LayerNorm, words + types + leaf(emb.position_embeddings, self.position_ids))

    def project(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        att = self.layers()[i].attention.self
        shape = (*x.shape[:-1], self.config.num_attention_heads, -1)
        return leaf(att.query, x).view(shape), leaf(att.key, x).view(shape), leaf(att.value, x).view(shape)

    def scale(self, i: int) -> float:
        return (self.config.hidden_size // self.config.num_attention_heads) ** -0.5

    def after_attention(self, i: int, x: Tensor, mixed: Tensor) -> Tensor:
        layer = self.layers()[i]
        x = leaf(layer.attention.output.LayerNorm, leaf(layer.attention.output.dense, mixed) + x)
        inner = nn.functional.gelu(leaf(layer.intermediate.dense, x))
        return leaf(layer.output.LayerNorm, leaf(layer.output.dense, inner) + x)

    def finish(self, x: Tensor) -> Tensor:
        pooled = torch.tanh(leaf(self.model.bert.pooler.dense, x[:, 0]))
        return leaf(self.model.classifier, pooled)


class GPT2Oracle(Oracle):
    """GPT2LMHeadModel: pre-norm, one fused q/k/v projection, learned positions that prompts do not have."""

    causal = True
    pools_query_only = True

    def attention_path(self, i: int) -> str:
        return f"transformer.h.{i}.attn"

    def layers(self) -> Any:
        return self.model.transformer.h

    def embed(self) -> Tensor:
        words = leaf(self.model.transformer.wte, self.batch.input_ids)
        return words + leaf(self.model.transformer.wpe, self.position_ids)

    def pre_norm(self, i: int, x: Tensor) -> Tensor:
        return leaf(self.layers()[i].ln_1, x)

    def project(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused = leaf(self.layers()[i].attn.c_attn, x)
        width = self.config.hidden_size
        shape = (*x.shape[:-1], self.config.num_attention_heads, -1)
        query, key, value = (fused[..., n * width : (n + 1) * width].reshape(shape) for n in range(3))
        return query, key, value

    def scale(self, i: int) -> float:
        return (self.config.hidden_size // self.config.num_attention_heads) ** -0.5

    def after_attention(self, i: int, x: Tensor, mixed: Tensor) -> Tensor:
        block = self.layers()[i]
        x = x + leaf(block.attn.c_proj, mixed)
        return x + leaf(block.mlp, leaf(block.ln_2, x))

    def finish(self, x: Tensor) -> Tensor:
        return leaf(self.model.lm_head, leaf(self.model.transformer.ln_f, x))


class LlamaOracle(Oracle):
    """LlamaForCausalLM, Qwen3ForCausalLM: pre-norm, rotary positions, grouped key/value heads, perhaps k_norm."""

    causal = True
    pools_query_only = True

    def attention_path(self, i: int) -> str:
        return f"model.layers.{i}.self_attn"

    def layers(self) -> Any:
        return self.model.model.layers

    def embed(self) -> Tensor:
        return leaf(self.model.model.embed_tokens, self.batch.input_ids)

    def pre_norm(self, i: int, x: Tensor) -> Tensor:
        return leaf(self.layers()[i].input_layernorm, x)

    def project(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        att = self.layers()[i].self_attn
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        query = leaf(att.q_proj, x).view(*x.shape[:-1], heads, -1)
        key = leaf(att.k_proj, x).view(*x.shape[:-1], kv_heads, -1)
        value = leaf(att.v_proj, x).view(*x.shape[:-1], kv_heads, -1)
        if hasattr(att, "q_norm"):
            query, key = leaf(att.q_norm, query), leaf(att.k_norm, key)
        return query, key, value

    def rotary_table(self, i: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        # transformers makes this table in float32 whatever the model's dtype is; taken from there, it cannot differ.
        cos, sin = self.model.model.rotary_emb.forward(x, positions)
        return cos, sin

    def rotate(self, i: int, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self.rotary_table(i, x, positions)
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * cos[:, :, None] + turned * sin[:, :, None]

    def scale(self, i: int) -> float:
        return self.config.head_dim**-0.5

    def after_attention(self, i: int, x: Tensor, mixed: Tensor) -> Tensor:
        layer = self.layers()[i]
        x = x + leaf(layer.self_attn.o_proj, mixed)
        return x + leaf(layer.mlp, leaf(layer.post_attention_layernorm, x))

    def finish(self, x: Tensor) -> Tensor:
        return leaf(self.model.lm_head, leaf(self.model.model.norm, x))


class Gemma3Oracle(LlamaOracle):
    """Gemma3ForCausalLM: norms on both sides, a rotary table and perhaps a window by layer. Slots are seen by all."""

    def rotary_table(self, i: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.model.model.rotary_emb.forward(x, positions, self.config.layer_types[i])
        return cos, sin

    def scale(self, i: int) -> float:
        return self.config.query_pre_attn_scalar**-0.5

    def window(self, i: int) -> int | None:
        return self.config.sliding_window if self.config.layer_types[i] == "sliding_attention" else None

    def after_attention(self, i: int, x: Tensor, mixed: Tensor) -> Tensor:
        layer = self.layers()[i]
        x = x + leaf(layer.post_attention_layernorm, leaf(layer.self_attn.o_proj, mixed))
        inner = leaf(layer.mlp, leaf(layer.pre_feedforward_layernorm, x))
        return x + leaf(layer.post_feedforward_layernorm, inner)


class EncoderDecoderOracle(Oracle):
    """Prompts in the encoder; the decoder may see those of the last encoder block through its cross-attention."""

    def keeps_slots(self, i: int) -> bool:
        assert self.mept is not None
        return self.mept.decoder_sees_prompts and i == len(self.layers()) - 1

    def decoder_ids(self) -> Tensor:
        labels = self.batch.labels
        assert labels is not None
        start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.config.pad_token_id)], 1)

    def memory_visible(self, memory: Tensor) -> Callable[[int, int, int], bool]:
        n_slots = memory.shape[1] - self.n_text
        return lambda b, t, j: j < n_slots or bool(self.real[b][j - n_slots])

    @staticmethod
    def earlier(b: int, t: int, j: int) -> bool:
        return j <= t


class T5Oracle(EncoderDecoderOracle):
    """T5ForConditionalGeneration: pre-norm, no scale, a relative bias that the first layer owns and all layers use."""

    has_relative_bias = True

    def attention_path(self, i: int) -> str:
        return f"encoder.block.{i}.layer.0.SelfAttention"

    def layers(self) -> Any:
        return self.model.encoder.block

    def embed(self) -> Tensor:
        return leaf(self.model.shared, self.batch.input_ids)

    def pre_norm(self, i: int, x: Tensor) -> Tensor:
        return leaf(self.layers()[i].layer[0].layer_norm, x)

    def heads(self, linear: nn.Module, x: Tensor) -> Tensor:
        return leaf(linear, x).view(*x.shape[:-1], self.config.num_heads, self.config.d_kv)

    def project(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        att = self.layers()[i].layer[0].SelfAttention
        return self.heads(att.q, x), self.heads(att.k, x), self.heads(att.v, x)

    def scale(self, i: int) -> float:
        return 1.0

    def bucket(self, relative: int, bidirectional: bool) -> int:
        buckets, offset = self.config.relative_attention_num_buckets, 0
        if bidirectional:
            buckets //= 2
            offset = buckets if relative > 0 else 0
            distance = abs(relative)
        else:
            distance = max(0, -relative)
        exact = buckets // 2
        if distance < exact:
            return offset + distance
        span = math.log(self.config.relative_attention_max_distance / exact)
        far = exact + int(math.log(distance / exact) / span * (buckets - exact))
        return offset + min(far, buckets - 1)

    def relative_bias(self, positions: list[int], query_position: int) -> Tensor:
        table = self.layers()[0].layer[0].SelfAttention.relative_attention_bias.weight
        return table[[self.bucket(position - query_position, True) for position in positions]]

    def after_attention(self, i: int, x: Tensor, mixed: Tensor) -> Tensor:
        block = self.layers()[i]
        x = x + leaf(block.layer[0].SelfAttention.o, mixed)
        return x + leaf(block.layer[1].DenseReluDense, leaf(block.layer[1].layer_norm, x))

    def finish(self, x: Tensor) -> Tensor:
        memory = leaf(self.model.encoder.final_layer_norm, x)
        y = leaf(self.model.shared, self.decoder_ids())
        table = self.model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight

        def bias(b: int, t: int, columns: list[int]) -> Tensor:
            return table[[self.bucket(j - t, False) for j in columns]]

        for block in self.model.decoder.block:
            own, cross, mlp = block.layer
            att, normed = own.SelfAttention, leaf(own.layer_norm, y)
            query, key, value = (self.heads(linear, normed) for linear in (att.q, att.k, att.v))
            y = y + leaf(att.o, attend(query, key, value, 1.0, self.earlier, bias=bias))
            att = cross.EncDecAttention
            query = self.heads(att.q, leaf(cross.layer_norm, y))
            key, value = self.heads(att.k, memory), self.heads(att.v, memory)
            y = y + leaf(att.o, attend(query, key, value, 1.0, self.memory_visible(memory)))
            y = y + leaf(mlp.DenseReluDense, leaf(mlp.layer_norm, y))
        y = leaf(self.model.decoder.final_layer_norm, y)
        if self.config.scale_decoder_outputs:
            y = y * self.config.d_model**-0.5
        return leaf(self.model.lm_head, y)


class BartOracle(EncoderDecoderOracle):
    """BartForConditionalGeneration: post-norm, learned positions by column."""

    def attention_path(self, i: int) -> str:
        return f"model.encoder.layers.{i}.self_attn"

    def layers(self) -> Any:
        return self.model.model.encoder.layers

    def embed_with(self, stack: Any, ids: Tensor) -> Tensor:
        positions = stack.embed_positions.weight[torch.arange(ids.shape[1]) + 2]  # BART's table starts two rows late
        return leaf(stack.layernorm_embedding, leaf(stack.embed_tokens, ids) + positions)

    def embed(self) -> Tensor:
        return self.embed_with(self.model.model.encoder, self.batch.input_ids)

    def heads(self, linear: nn.Module, x: Tensor) -> Tensor:
        return leaf(linear, x).view(*x.shape[:-1], self.config.encoder_attention_heads, -1)

    def project(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        att = self.layers()[i].self_attn
        return self.heads(att.q_proj, x), self.heads(att.k_proj, x), self.heads(att.v_proj, x)

    def scale(self, i: int) -> float:
        return (self.config.d_model // self.config.encoder_attention_heads) ** -0.5

    @staticmethod
    def feed_forward(layer: Any, x: Tensor) -> Tensor:
        inner = leaf(layer.fc2, nn.functional.gelu(leaf(layer.fc1, x)))
        return leaf(layer.final_layer_norm, x + inner)

    def after_attention(self, i: int, x: Tensor, mixed: Tensor) -> Tensor:
        layer = self.layers()[i]
        x = leaf(layer.self_attn_layer_norm, x + leaf(layer.self_attn.out_proj, mixed))
        return self.feed_forward(layer, x)

    def finish(self, x: Tensor) -> Tensor:
        y = self.embed_with(self.model.model.decoder, self.decoder_ids())
        for layer in self.model.model.decoder.layers:
            att = layer.self_attn
            query, key, value = (self.heads(linear, y) for linear in (att.q_proj, att.k_proj, att.v_proj))
            mixed = attend(query, key, value, self.scale(0), self.earlier)
            y = leaf(layer.self_attn_layer_norm, y + leaf(att.out_proj, mixed))
            att = layer.encoder_attn
            query, key, value = self.heads(att.q_proj, y), self.heads(att.k_proj, x), self.heads(att.v_proj, x)
            mixed = attend(query, key, value, self.scale(0), self.memory_visible(x))
            y = leaf(layer.encoder_attn_layer_norm, y + leaf(att.out_proj, mixed))
            y = self.feed_forward(layer, y)
        return leaf(self.model.lm_head, y) + self.model.final_logits_bias


class _Functional:
    """torch.nn.functional, but for a softmax that does not drop float64 to the float32 it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn.functional, name)

    @staticmethod
    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.softmax(x, dim=dim)


class _NN:
    functional = _Functional()

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)


def _t5_norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _gemma_norm(self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


def _turn(positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].double() * inv_freq.double()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling


def _rotary_table(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    return _turn(position_ids, self.inv_freq, self.attention_scaling)


def _gemma_rotary_table(self: Any, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
    inv_freq, scaling = getattr(self, f"{layer_type}_inv_freq"), getattr(self, f"{layer_type}_attention_scaling")
    return _turn(position_ids, inv_freq, scaling)


@contextlib.contextmanager
def transformers_in_float64(rotary_table: bool = True) -> Iterator[None]:
    """Lift the float32 that transformers' RMS norms, eager softmax and rotary tables use even in a float64 model.

    Two ways of summing differ by 1e-16; a float32 in between makes 1e-8 of that, and two rotations of a float32 table
    are one of another position only to 1e-7: 1e-10 would be out of reach for reasons that are not the package's. Only
    transformers' own modules are changed: a float32 in the package shows.
    """
    swaps: list[tuple[Any, str, Any]] = [
        (modeling_t5.T5LayerNorm, "forward", _t5_norm),
        (modeling_llama.LlamaRMSNorm, "forward", _t5_norm),
        (modeling_qwen3.Qwen3RMSNorm, "forward", _t5_norm),
        (modeling_gemma3.Gemma3RMSNorm, "forward", _gemma_norm),
    ]
    modules: tuple[ModuleType, ...] = (modeling_llama, modeling_qwen3, modeling_gemma3)
    swaps += [(module, "nn", _NN()) for module in modules]
    if rotary_table:
        swaps += [
            (modeling_llama.LlamaRotaryEmbedding, "forward", _rotary_table),
            (modeling_qwen3.Qwen3RotaryEmbedding, "forward", _rotary_table),
            (modeling_gemma3.Gemma3RotaryEmbedding, "forward", _gemma_rotary_table),
        ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in swaps]
    try:
        for owner, name, value in swaps:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
