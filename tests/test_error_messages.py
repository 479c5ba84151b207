"""The page of error messages is what is said now, and no message is a bare one."""

from __future__ import annotations

import re

import pytest
import wrong_input

# Errors in words of Python's or torch's own, which name no argument of the user's.
BARE = re.compile(
    r"^'\w+'$|object (is|has|of)|unsupported operand|positional argument|index out of range"
    r"|not (callable|iterable|subscriptable)$|ambiguous|not supported between|cannot unpack"
)


@pytest.fixture(scope="module")
def rows():
    return wrong_input.said()


def test_all_of_it_is_refused_by_an_error_made_for_it(rows):
    assert len(rows) > 350
    allowed = {"TypeError", "ValueError", "SystemExit"}
    assert not [row for row in rows if row.error not in allowed]
    # Our messages may quote torch's after what must be.
    assert not [r for r in rows if BARE.search(r.message) and " must be " not in r.message]


def test_each_message_tells_what_and_what_would_be_right(rows):
    """A value or the names of what is missing, and a limit, a choice or a thing to do."""
    remedy = re.compile(
        r"must|give|use|build|load|swap|leave|delete|clone|wrap|needs|raise|put|append|call|take"
        r"|construct|set them|look at|name the one|run one|average|lower|no effect|both|one of"
        r"|never begin|there is no|invalid|only|step_fn|detach|unrecognized|belongs to no"
    )
    assert not [row for row in rows if not remedy.search(row.message)]
    assert not [row for row in rows if len(row.message) > 1200]


def test_the_page_is_what_is_said_now(rows, monkeypatch):
    monkeypatch.setattr(wrong_input, "said", lambda: rows)
    assert wrong_input.PAGE.read_text() == wrong_input.page(), "run `make errors`"
