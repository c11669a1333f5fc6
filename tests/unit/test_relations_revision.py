from __future__ import annotations

import inspect

from ingestor.admin.hypertable import RelationsRevision, relations_revision


def test_the_newest_revision_has_all_that_the_conversion_calls() -> None:
    """The revision that makes the relations has every function of the protocol, with the same parameters."""
    revision = relations_revision()
    assert "market.bars_1m" in revision.RELATIONS
    names = [name for name in vars(RelationsRevision) if not name.startswith("_")]
    assert len(names) == 5
    for name in names:
        _, *wanted = inspect.signature(getattr(RelationsRevision, name)).parameters
        assert list(inspect.signature(getattr(revision, name)).parameters) == wanted, name
