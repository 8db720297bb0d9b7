# SPDX-License-Identifier: Apache-2.0
"""Reads the source of a module's forward: its parameters, and what it calls in which order."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn


def unwrapped_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward function as its modelling file defines it, without decorators and device hooks."""
    return inspect.unwrap(type(module).forward)


def parameter_names(attention: nn.Module) -> tuple[str, ...]:
    """Names of the attention layer's positional arguments, in order."""
    return tuple(inspect.signature(unwrapped_forward(attention)).parameters)[1:]


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether the module's own forward computes attention through transformers' `AttentionInterface`."""
    code = getattr(unwrapped_forward(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def calls_sdpa(module: nn.Module) -> bool:
    """Whether the module's own forward calls torch's `scaled_dot_product_attention`."""
    code = getattr(unwrapped_forward(module), "__code__", None)
    return code is not None and "scaled_dot_product_attention" in code.co_names


@lru_cache(maxsize=256)
def calls_in_order(function: Callable[..., Any]) -> tuple[str, ...]:
    """Attributes of `self` that a function calls, in the order of the calls (arguments before the call itself)."""
    calls: list[str] = []

    class Visitor(ast.NodeVisitor):
        def visit_Call(self, node: ast.Call) -> None:
            self.generic_visit(node)
            # A call of a list item, such as self.attentions[0](x), counts as a call of the list.
            called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                calls.append(called.attr if called.value.id == "self" else "")

    Visitor().visit(_source_tree(function))
    return tuple(filter(None, calls))


@lru_cache(maxsize=256)
def passes_on_keywords(function: Callable[..., Any]) -> bool:
    """Whether a function takes **kwargs and passes them on to something that it calls."""
    parameters = inspect.signature(function).parameters.values()
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    calls = (node for node in ast.walk(_source_tree(function)) if isinstance(node, ast.Call))
    handed_on = (word.value for call in calls for word in call.keywords if word.arg is None)
    return rest is not None and any(isinstance(value, ast.Name) and value.id == rest for value in handed_on)


@lru_cache(maxsize=256)
def reads_into(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function itself reads an argument (an index or an attribute of it) and does not only pass it on."""
    nodes = ast.walk(_source_tree(function))
    looks = (node.value for node in nodes if isinstance(node, (ast.Subscript, ast.Attribute)))
    return any(isinstance(value, ast.Name) and value.id == argument for value in looks)


@lru_cache(maxsize=256)
def gives(function: Callable[..., Any], keyword: str) -> bool:
    """Whether a function calls anything with a keyword argument of that name."""
    calls = (node for node in ast.walk(_source_tree(function)) if isinstance(node, ast.Call))
    return any(word.arg == keyword for call in calls for word in call.keywords)


@lru_cache(maxsize=256)
def compares(function: Callable[..., Any], attribute: str) -> bool:
    """Whether a function compares an attribute of that name with anything."""
    comparisons = (node for node in ast.walk(_source_tree(function)) if isinstance(node, ast.Compare))
    parts = (part for comparison in comparisons for part in ast.walk(comparison))
    return any(isinstance(part, ast.Attribute) and part.attr == attribute for part in parts)


@lru_cache(maxsize=256)
def divides_its_loss(forward: Callable[..., Any]) -> bool:
    """Whether a model passes **kwargs on to its loss function, which then divides by `num_items_in_batch`."""
    parameters = inspect.signature(forward).parameters.values()
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    try:
        calls = [node for node in ast.walk(_source_tree(forward)) if isinstance(node, ast.Call)]
    except ValueError:  # without source, decide like the Trainer: by the arguments
        return rest is not None
    losses = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "loss_function"]
    handed_on = (word.value for call in losses for word in call.keywords if word.arg is None)
    return rest is not None and any(isinstance(value, ast.Name) and value.id == rest for value in handed_on)


def _source_tree(function: Callable[..., Any]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError as error:
        raise ValueError(
            f"The source of {function.__qualname__} cannot be read. The generic rule for architectures outside the "
            "tested table needs it to find the norm in front of attention. This model is not supported."
        ) from error


def accepts_keyword_arguments(model: nn.Module) -> bool:
    """Whether the model's forward takes **kwargs, which reach the attention layers."""
    parameters = inspect.signature(unwrapped_forward(model)).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
