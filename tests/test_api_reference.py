"""The API reference: each public name tells its arguments, errors and an example, and has a page.

Examples are run. ``make docs`` renders the pages.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from places import ROOT

import clr_optim

DOCS = ROOT / "docs/reference"
MODULES = ["clr_optim", "clr_optim.schedule", "clr_optim.range_test", "clr_optim.plotting"]


def exported(module):
    found = importlib.import_module(module)
    return [(name, getattr(found, name)) for name in found.__all__]


def members_of(thing):
    """Yield what a class defines, and what it inherits from a class of ours."""
    for cls in reversed(thing.__mro__) if isinstance(thing, type) else ():
        if cls.__module__.startswith("clr_optim."):
            yield from vars(cls).items()


def public_callables():
    """Each public function, class and method once: (name, object, the class it is of)."""
    found = {}
    for module in MODULES:
        for name, thing in exported(module):
            if not callable(thing):
                continue
            found[name] = (thing, None)
            for member, value in members_of(thing):
                value = getattr(value, "__func__", value)
                if inspect.isfunction(value) and (member == "__call__" or member[0] != "_"):
                    found[f"{name}.{member}"] = (value, thing)
    return [pytest.param(name, *rest, id=name) for name, rest in found.items()]


PUBLIC = public_callables()


def sections(docstring):
    """The sections of a docstring by name, "" for what stands before the first."""
    names = "Args|Returns|Raises|Source|Example"
    parts = re.split(rf"^({names}):(?=\n| )", inspect.cleandoc(docstring), flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def described(docstring):
    """The names that the section Args describes, in its order."""
    body = textwrap.dedent(sections(docstring).get("Args", "").lstrip("\n"))
    heads = re.findall(r"^([*\w][*\w, ]*):", body, flags=re.M)
    return [name.lstrip("*") for head in heads for name in head.split(", ")]


def parameters(thing):
    if isinstance(thing, type) and issubclass(thing, dict):
        return list(thing.__annotations__)
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def raises(function, seen=None):
    """Whether a function has a ``raise`` of its own, or calls a function of ours that has one.

    Methods that it calls are not looked into: what they may raise depends on more than arguments.
    """
    seen = set() if seen is None else seen
    if function in seen:
        return False
    seen.add(function)
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = inspect.unwrap(function).__globals__.get(node.func.id)
            if isinstance(called, type) and called.__module__.startswith("clr_optim."):
                called = maker(called)
            ours = getattr(called, "__module__", None) or ""
            if (
                inspect.isfunction(called)
                and ours.startswith("clr_optim.")
                and raises(called, seen)
            ):
                return True
    return False


def maker(cls):
    """What runs when a class is called, as far as it is written here."""
    name = "__post_init__" if dataclasses.is_dataclass(cls) else "__init__"
    return vars(cls).get(name)


def examples(thing):
    return "".join(e.source for e in doctest.DocTestParser().get_examples(thing.__doc__ or ""))


def module_of(param):
    return inspect.unwrap(param.values[1]).__module__


@pytest.mark.parametrize("module", sorted(set(map(module_of, PUBLIC))))
def test_examples_run(module):
    names = {"torch": torch, "CyclicalOptimizer": clr_optim.CyclicalOptimizer}
    result = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize(("name", "thing", "owner"), PUBLIC)
def test_a_docstring_names_every_argument_and_no_other(name, thing, owner):
    assert thing.__doc__
    assert sections(thing.__doc__)[""].strip()
    if dataclasses.is_dataclass(thing):  # fields, however the class is made
        assert sorted(described(thing.__doc__)) == sorted(f.name for f in dataclasses.fields(thing))
    else:
        assert sorted(described(thing.__doc__)) == sorted(parameters(thing))


@pytest.mark.parametrize(("name", "thing", "owner"), PUBLIC)
def test_what_raises_says_so(name, thing, owner):
    function = maker(thing) if isinstance(thing, type) else thing
    if inspect.isfunction(function) and raises(inspect.unwrap(function)):
        assert re.search(r"\n +[\w, ]+Error: ", sections(thing.__doc__).get("Raises", ""))


@pytest.mark.parametrize(("name", "thing", "owner"), PUBLIC)
def test_what_it_returns_has_no_words_where_a_type_is_expected(name, thing, owner):
    """What stands before a colon there is rendered as a type's name, and leads nowhere."""
    first = sections(thing.__doc__).get("Returns", "").strip().partition("\n")[0]
    assert ": " not in first, first


@pytest.mark.parametrize(("name", "thing", "owner"), PUBLIC)
def test_an_example_shows_its_use(name, thing, owner):
    """A method's may stand in its class's docstring."""
    code = examples(thing) + (examples(owner) if owner is not None else "")
    used = name.rpartition(".")[2]
    if used != "__call__":
        assert re.search(rf"\b{used}\b", code)
    else:
        assert ")(" in code


@pytest.mark.parametrize("module", MODULES)
def test_properties_and_constants_are_described(module):
    source = Path(importlib.import_module(module).__file__).read_text()
    for name, thing in exported(module):
        if not callable(thing) and not name.startswith("__"):
            assert re.search(rf"^#: .+(\n#: .+)*\n{name}\b", source, flags=re.M), name
        for member, value in vars(thing).items() if isinstance(thing, type) else ():
            if isinstance(value, property) and not member.startswith("_"):
                assert value.__doc__, f"{name}.{member}"


def test_every_public_module_has_a_page_that_leaves_out_no_name():
    """A name is rendered where it is made; a page may leave out only what another one has."""
    pages = {}
    for page in DOCS.glob("*.rst"):
        for module in re.findall(r"^\.\. automodule:: (\S+)$", page.read_text(), flags=re.M):
            out = re.findall(r"^   :exclude-members: (.+)$", page.read_text(), flags=re.M)
            pages[module] = (page.stem, set(", ".join(out).split(", ")) - {""})
    assert sorted(pages) == sorted(MODULES)
    index = (ROOT / "docs/index.md").read_text()
    assert all(f"\nreference/{page}\n" in index for page, _ in pages.values())
    for module, (_, left_out) in pages.items():
        assert left_out <= set(importlib.import_module(module).__all__)
        for name in left_out:
            home = getattr(importlib.import_module(module), name).__module__
            assert home != module
            assert home in pages
            assert name not in pages[home][1]


def test_these_checks_can_fail():
    def wrong(a, b):
        """What it does.

        Args:
            a: something.
        """
        raise ValueError(a, b)

    def deep(a):
        return wrong(a, a)

    assert described(wrong.__doc__) == ["a"]
    assert parameters(wrong) == ["a", "b"]
    assert raises(wrong)
    assert not examples(wrong)
    assert "Raises" not in sections(wrong.__doc__)
    assert raises(importlib.import_module("clr_optim.schedule").triangular)  # two calls down
    assert not raises(importlib.import_module("clr_optim.schedule").describe_callable)
