# SPDX-License-Identifier: Apache-2.0
"""Seeded faults: each is put into a copy of the package, and some test has to fail of it.

    python tests/faults.py                 # all of them, some ten minutes on one core
    python tests/faults.py --only gates    # those whose name says so

It writes which test caught which fault to `tests/FAULTS.md` when all were run. A fault that nothing catches is a
missing test. The working tree is not touched.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "FAULTS.md"
INVARIANCE, PARITY = "tests/contract/test_invariance.py", "tests/parity/test_mept_parity.py"
CHOSEN = "tests/unit/engine/test_chosen.py"
TRAINING, SWITCHING = "tests/contract/test_training.py", "tests/contract/test_switching.py"


@dataclass(frozen=True)
class Fault:
    """One mistake somebody might make.

    Attributes:
        name: what is wrong.
        file: of the package.
        right, wrong: the text there, which stands in it once, and the text instead.
        tests: arguments of pytest by which to look for it.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


FAULTS = [
    Fault(
        "the padding mask is dropped",
        "engine/key_value.py",
        "real = kernel.real(mask, x.shape[1]) if padded else None",
        "real = None",
        (INVARIANCE, "-k", "padding and mept-bert"),
    ),
    Fault(
        "gates go to each other's experts",
        "routing/router.py",
        "(gates[..., None, None] * experts[index]).sum(dim=1)",
        "(gates[..., None, None] * experts[index.flip(-1)]).sum(dim=1)",
        ("tests/contract/test_reference.py", "-k", "routed and bert"),
    ),
    Fault(
        "the router's softmax runs over the batch",
        "routing/router.py",
        "(best if renormalize else logits).logsumexp(dim=-1, keepdim=True)",
        "(best if renormalize else logits).logsumexp(dim=0, keepdim=True)",
        (INVARIANCE, "-k", "alone and mept-bert"),
    ),
    Fault(
        "gates outside the top k stay open",
        "routing/router.py",
        "closed = best.new_full((*best.shape[:-1], experts), -torch.inf)",
        "closed = best.new_full((*best.shape[:-1], experts), -1.0)",
        ("tests/unit/reports/test_routing_report.py",),
    ),
    Fault(
        "the router reads the input without its norm",
        "routing/router.py",
        "weight = unit_rms(x) if normalize else torch.ones",
        "weight = unit_rms(x) if not normalize else torch.ones",
        ("tests/contract/test_reference.py", "-k", "routed and llama"),
    ),
    Fault(
        "the shared expert is forgotten",
        "mept/layer.py",
        "return mixed if shared is None else mixed + shared.sum(dim=0)",
        "return mixed",
        ("tests/contract/test_reference.py", "-k", "routed and gpt2"),
    ),
    Fault(
        "rows that are real tokens start at another size than the stream that they join",
        "mept/model.py",
        'if config.start_scale == "unit" and not layer.as_tokens(adapter_name):',
        'if config.start_scale == "unit":',
        ("tests/unit/engine/test_vocabulary_start.py", "-k", "unit_scale and t5"),
    ),
    Fault(
        "every norm is taken to remove scale",
        "engine/vocabulary_start.py",
        "return scaled if bool((after - before).norm() <= REMOVED * before.norm()) else inputs",
        "return scaled",
        ("tests/unit/engine/test_vocabulary_start.py", "-k", "unit_scale and lets"),
    ),
    Fault(
        "the balance loss never reaches the gradient",
        "routing/auxiliary_loss.py",
        "return gradients[0], None if gradient is None else gradient.to(ctx.device), None",
        "return gradients[0], None, None",
        (TRAINING, "-k", "balance_loss_reaches and mept-bert"),
    ),
    Fault(
        "the balance loss counts padding",
        "mept/layer.py",
        "term = config.balance_loss_weight * balance_loss(logits, experts, real)",
        "term = config.balance_loss_weight * balance_loss(logits, experts, None)",
        (TRAINING, "-k", "padding and mept-bert"),
    ),
    Fault(
        "gates are not applied where no gradient is needed",
        "engine/columns.py",
        "gates = F.pad(gates.to(query.dtype), (0, columns - gates.shape[-1]))[:, None]",
        "gates = F.pad(0 * gates.to(query.dtype), (0, columns - gates.shape[-1]))[:, None]",
        ("tests/contract/test_generation.py", "-k", "uncached and mept-llama-token"),
    ),
    Fault(
        "the score of the chosen experts is written without the scale",
        "engine/chosen.py",
        "value = (score / settings.scale).clamp(",
        "value = score.clamp(",
        (PARITY, "-k", "equals_oracle and bert-token"),
    ),
    Fault(
        "a decoding step gathers the wrong experts",
        "engine/rows.py",
        "chosen, (batch, number, _) = choice.experts[:, 0], table.shape",
        "chosen, (batch, number, _) = choice.experts[:, 0].flip(0), table.shape",
        ("tests/unit/engine/test_attention.py", "-k", "gathered"),
    ),
    Fault(
        "what fills blocks up takes part in gradients",
        "engine/chosen_slots.py",
        "filled = (self.order.source >= 0)",
        "filled = (self.order.source >= -1)",
        (CHOSEN, "-k", "apart"),
    ),
    Fault(
        "a token's several experts are not weighed against each other",
        "engine/chosen_slots.py",
        "score = share * (score + inner - (share * inner).sum(dim=1, keepdim=True))",
        "score = share * score",
        (CHOSEN, "-k", "apart"),
    ),
    Fault(
        "queries are not turned back to where their text begins",
        "engine/chosen_slots.py",
        "return self._by(-self.sin, rows)",
        "return self._by(0 * self.sin, rows)",
        (PARITY, "-k", "equals_oracle and llama-token and left_columns"),
    ),
    Fault(
        "scores of chosen experts are not capped",
        "engine/chosen_slots.py",
        "self.slope, scores = 1 - squashed.square(), squashed * cap",
        "self.slope = 1 - squashed.square()",
        ("tests/contract/test_token_routing.py", "-k", "gemma2"),
    ),
    Fault(
        "prompts stand one position too far back",
        "engine/positions.py",
        "return torch.arange(rows, device=device) % slots - slots",
        "return torch.arange(rows, device=device) % slots - slots - 1",
        ("tests/contract/test_reference.py", "-k", "static and llama"),
    ),
    Fault(
        "T5's relative bias forgets where the query is",
        "engine/positions.py",
        "distance = offsets[None, None, :] + start - query",
        "distance = offsets[None, None, :] + start - 0 * query",
        ("tests/contract/test_reference.py", "-k", "static and t5"),
    ),
    Fault(
        "rows of DeBERTa have no scores of their positions",
        "engine/own_attention.py",
        "rows = rows if bias is None else rows + bias.to(rows.dtype)",
        "rows = rows + 0.0",
        ("tests/contract/test_generic_rule.py", "-k", "deberta-v3"),
    ),
    Fault(
        "rows of speech encoders stand a frame further away",
        "models/relative.py",
        "places = (length - 1 - asked.distance())[:, None]",
        "places = (length - 2 - asked.distance())[:, None]",
        ("tests/unit/engine/test_relative.py", "-k", "longer_sound"),
    ),
    Fault(
        "biases that a stack makes are taken for its layers' own",
        "models/reachable.py",
        "or _biases_of_the_stack(model, path, attention)",
        "or None",
        ("tests/contract/test_generic_rule.py", "-k", "refused_before and udop"),
    ),
    Fault(
        "a layer that compares names of kernels sees the interface's",
        "engine/transformers_attention.py",
        "compared = site.family is None and compares(",
        "compared = site.family is None and not compares(",
        ("tests/contract/test_generic_rule.py", "-k", "deepseek_v32"),
    ),
    Fault(
        "what a prompt gets is not compared with what a token gets",
        "engine/rehearsal.py",
        "if (made - own).abs().mean() > CLOSE * own.abs().mean():",
        "if False:",
        ("tests/unit/engine/test_rehearsal.py",),
    ),
    Fault(
        "keys that neighbours have a part in are taken for a row's own",
        "engine/trial.py",
        "return bool((one - two).abs().max() > CLOSE * (one.abs().max() + 1e-12))",
        "return False",
        ("tests/contract/test_generic_rule.py", "-k", "zaya"),
    ),
    Fault(
        "routers of a causal language model read the answer",
        "models/query.py",
        "return answered.cumsum(dim=1) == 0",
        "return torch.ones_like(answered)",
        (INVARIANCE, "-k", "no_answer_reaches and mept-llama"),
    ),
    Fault(
        "a mask that keeps neighbours apart is taken for one sample's",
        "models/packed_rows.py",
        "if bool(torch.stack(apart).all(dim=0).any()):",
        "if False:",
        ("tests/unit/models/test_packed_rows.py",),
    ),
    Fault(
        "router centres take in what a model writes while it trains",
        "mept/layer.py",
        "if not call.learns:",
        "if False:",
        ("tests/unit/engine/test_given_query.py", "-k", "centre"),
    ),
    Fault(
        "decoding makes its rows anew at each step",
        "engine/row_cache.py",
        "        past = length > 0\n    rows",
        "        past = False\n    rows",
        ("tests/contract/test_generation.py", "-k", "uncached and mept-llama-token"),
    ),
    Fault(
        "rows stay behind when a cache changes its batch",
        "engine/rows.py",
        "return change(kept) if kept.shape[0] > 1 else kept",
        "return kept",
        ("tests/contract/test_generation.py", "-k", "follow and mept-llama-token"),
    ),
    Fault(
        "rows go on with keys that were changed by hand",
        "engine/row_cache.py",
        "        _check_unchanged(layer, own)\n",
        "",
        ("tests/unit/engine/test_row_cache.py", "-k", "by_hand"),
    ),
    Fault(
        "a causal body without a head is routed as if nobody read its tokens",
        "models/sites.py",
        "by_token=causal and not answers_by_row(model, path)",
        'by_token=causal and hasattr(model, "lm_head")',
        ("tests/unit/models/test_causality.py",),
    ),
    Fault(
        "a part of a model that is called by itself tells its routers nothing",
        "engine/model_hooks.py",
        "self._inner += CalledModule(self, module).attach(module)",
        "pass",
        ("tests/unit/engine/test_called_module.py", "-k", "by_itself"),
    ),
    Fault(
        "a loss in a tuple has no balance loss",
        "engine/called_module.py",
        "if not isinstance(loss, Tensor) or loss.ndim > 0 or not loss.requires_grad:",
        "if True:",
        ("tests/contract/test_training.py", "-k", "tuples and mept-bert"),
    ),
    Fault(
        "disabling does not disable",
        "adapter_state.py",
        "        if self.disable_adapters:\n            return []\n        return [name for name in self.active",
        "        return [name for name in self.active",
        (SWITCHING, "-k", "disabled and mept-bert"),
    ),
    Fault(
        "unloading leaves the hooks",
        "engine/prompt_layer.py",
        "            handle.remove()\n",
        "            pass\n",
        (SWITCHING, "-k", "unload_gives and mept-bert-sample and training"),
    ),
    Fault(
        "unloading leaves the view of the config",
        "engine/key_value.py",
        "self.site.attention.config = self.site.attention.config.real",
        "pass",
        (SWITCHING, "-k", "unload_gives and mept-bert-sample and training"),
    ),
    Fault(
        "an adapter with NaN loads",
        "sharing/load_checks.py",
        "if not given.is_meta and not bool(torch.isfinite(given).all()):",
        "if False:",
        ("tests/attacks/test_adapter_folders.py",),
    ),
    Fault(
        "top_k may exceed the number of experts",
        "mept/config.py",
        'check_int("top_k", self.top_k, 1, self.num_experts)',
        'check_int("top_k", self.top_k, 1, 10**9)',
        ("tests/unit/test_config.py",),
    ),
    Fault(
        "a record counts padding",
        "reports/routing_report.py",
        "weight = real[..., None]",
        "weight = torch.ones_like(real)[..., None]",
        ("tests/unit/reports/test_routing_report.py",),
    ),
    Fault(
        "kept rows serve a model that trains on",
        "engine/key_value.py",
        "anew = turned or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()",
        "anew = turned",
        ("tests/unit/engine/test_static_rows.py",),
    ),
    Fault(
        "VAPT's convolution reads the class token",
        "vapt/layer.py",
        "z = aggregate(x[:, self.site.patches.prefix :], weights",
        "z = aggregate(x[:, : x.shape[1] - self.site.patches.prefix], weights",
        ("tests/parity/test_vapt_parity.py", "-k", "equals_oracle and vit"),
    ),
    Fault(
        "VAPT's kernel is flipped",
        "vapt/generator.py",
        "spread = F.conv_transpose2d(maps, kernel, groups=channels)",
        "spread = F.conv_transpose2d(maps, kernel.flip(-1), groups=channels)",
        ("tests/parity/test_vapt_parity.py", "-k", "equals_oracle and vit"),
    ),
    Fault(
        "VAPT's dropout stays on in evaluation",
        "vapt/layer.py",
        "dropout = config.projector_dropout if self.training else 0.0",
        "dropout = config.projector_dropout",
        (TRAINING, "-k", "noise and vapt-vit"),
    ),
    Fault(
        "the frozen backbone trains along",
        "engine/model_hooks.py",
        "if not (self._model[0].training and any(config.backbone_eval for config in working)):",
        "if True:",
        ("tests/unit/vapt/test_vapt.py", "-k", "frozen_part"),
    ),
    Fault(
        "pMoE's dispatch is normalised over the slots",
        "pmoe/dispatch.py",
        "    shares = scores.softmax(dim=-1)\n    return torch.matmul(shares",
        "    shares = scores.softmax(dim=1)\n    return torch.matmul(shares",
        ("tests/parity/test_pmoe_parity.py", "-k", "equals_oracle and token"),
    ),
    Fault(
        "pMoE's experts get the base model's pixels",
        "pmoe/fusion.py",
        "fitted = fit_pixels(pixels, incoming, _normalisation(record.mean, record.std), size)",
        "fitted = fit_pixels(pixels, incoming, incoming, size)",
        ("tests/unit/pmoe/test_pmoe.py", "-k", "normalisation"),
    ),
    Fault(
        "prototypes are assigned over the whole batch",
        "promotion/prototypes.py",
        "log = scores.to(torch.promote_types(scores.dtype, torch.float32))",
        "log = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(0, 1)[None]",
        (INVARIANCE, "-k", "alone and promotion-vit"),
    ),
    Fault(
        "the denoiser's target is not detached",
        "promotion/denoiser.py",
        "clean = clean.detach().to(routing_dtype(clean))",
        "clean = clean.to(routing_dtype(clean))",
        ("tests/unit/promotion/test_denoiser.py",),
    ),
    Fault(
        "directions are compared with the image's mean in them",
        "promotion/prototypes.py",
        "v = v - v.mean(dim=1, keepdim=True)",
        "v = v - 0.0",
        ("tests/parity/test_promotion_parity.py", "-k", "equals_oracle and default"),
    ),
    Fault(
        "the bank moves before the backward pass",
        "promotion/bank.py",
        "bank.pending, bank.pending_starts, bank.draft = draft, bank.may_be_unstarted, None",
        "bank.pending, bank.pending_starts, bank.draft = draft, bank.may_be_unstarted, None; bank.settle()",
        ("tests/unit/promotion/test_bank.py",),
    ),
    Fault(
        "blocks in stages are counted within their stage",
        "models/surroundings.py",
        "return found.group(0), before + int(found.group(3))",
        "return found.group(0), int(found.group(3))",
        ("tests/unit/promotion/test_swin.py", "-k", "counted"),
    ),
    Fault(
        "maps of backbones are taken before the unit adds to them",
        "engine/block_layer.py",
        "register_forward_hook(self._after_block, prepend=True, with_kwargs=True)",
        "register_forward_hook(self._after_block, with_kwargs=True)",
        ("tests/unit/promotion/test_unit.py", "-k", "maps"),
    ),
    Fault(
        "nothing in front of re-entrantly checkpointed blocks needs a gradient",
        "engine/checkpointed.py",
        "args[first].detach().requires_grad_(True)",
        "args[first]",
        (TRAINING, "-k", "checkpointing_gives and vapt"),
    ),
    Fault(
        "a block that runs again in the backward pass is not known by its first run",
        "engine/checkpointed.py",
        'return settings.get("use_reentrant") is not False',
        "return False",
        ("tests/contract/test_generic_rule.py", "-k", "find_their_input"),
    ),
    Fault(
        "prompts are carried on without their gradient",
        "engine/token_layer.py",
        "call is None or call.learns != torch.is_grad_enabled()",
        "False",
        ("tests/contract/test_handed_on.py", "-k", "carry"),
    ),
    Fault(
        "rows are less open than the tokens under a mask that adds to what is open",
        "models/written_out.py",
        "mask.amax(dim=-1, keepdim=True)",
        "mask.amax(dim=-1, keepdim=True) * 0",
        ("tests/unit/engine/test_vision_layers.py", "-k", "eomt"),
    ),
]


def seeded(fault: Fault, folder: Path) -> None:
    """A copy of the project in `folder`, with the fault in it."""
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "outputs", "results")
    shutil.copytree(ROOT, folder, ignore=ignored)
    file = folder / "peft_promptmoe" / fault.file
    text = file.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        raise SystemExit(
            f"{fault.file} has {text.count(fault.right)} times what {fault.name!r} replaces:\n{fault.right}"
        )
    file.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def caught_by(fault: Fault) -> str | None:
    """The first test that fails with the fault in the package; None if all pass."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "project"
        seeded(fault, folder)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests]
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return None
        failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        if done.returncode != 1 or failed is None:  # nothing was collected, or the copy is broken
            raise SystemExit(f"{fault.name}: the tests did not run.\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
        return failed[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a fault's name")
    only = parser.parse_args().only
    lines, missed = [], []
    for fault in FAULTS:
        if only not in fault.name:
            continue
        test = caught_by(fault)
        print(f"{fault.name}: {test or 'NOT CAUGHT'}", flush=True)
        missed += [] if test else [fault.name]
        lines.append(f"| {fault.name} | `{fault.file}` | {f'`{test}`' if test else '**none**'} |")
    if not only:
        head = [
            "# Seeded faults",
            "",
            f"{len(lines)} faults, {len(missed)} of them not caught. Made by `make faults`.",
            "",
        ]
        table = ["| fault | in | caught by |", "| --- | --- | --- |", *lines]
        REPORT.write_text("\n".join([*head, *table]) + "\n", encoding="utf-8")
    if missed:
        raise SystemExit(f"not caught: {', '.join(missed)}")


if __name__ == "__main__":
    main()
