"""Every documented query gives the documented answer, in every edition, to a login that may only read."""

from __future__ import annotations

import pytest

from ingestor.admin.maintenance import maintain
from ingestor.admin.roles import grant_analyst
from ingestor.settings import load_settings
from tests.examples import PAGE, answers, examples, seed
from tests.servers import TestServer, with_parts

pytestmark = pytest.mark.usefixtures("bundled_calendar")


def test_all_questions() -> None:
    """Every question of the page is run, and all but those that only set something have an answer."""
    page = PAGE.read_text(encoding="utf-8")
    found = examples(page)
    assert sum(each.language == "sql" for each in found) == 25
    assert sum(each.language == "python" for each in found) == page.count("```python") == 3
    assert [each.code for each in found if not each.output] == ["SET TIME ZONE 'Pacific/Auckland';\n"]
    assert [line.split(".")[0] for line in page.splitlines() if line.startswith("### ")] == [
        f"### {number}" for number in range(1, 25)
    ]


async def test_the_documented_answers(database: str, server: TestServer) -> None:
    """An analyst's login gets the documented answers."""
    name = server.new_name()
    await seed(database)
    await maintain(load_settings(database_url=database), lambda _: None)
    await grant_analyst(database, name, password="analyst-of-the-tests", statement_timeout=30, report=lambda _: None)
    short = database.rpartition("/")[2].partition("?")[0]
    try:
        await assert_answers(with_parts(database, database=short, user=name, password="analyst-of-the-tests"))
    finally:
        await server.run(f"DROP ROLE {name}")


@pytest.mark.timeout(600)  # a server in WebAssembly takes 44 ms for each answer
async def test_the_documented_answers_of_continuous_aggregates(community: str) -> None:
    """The owner gets the documented answers from continuous aggregates, over one connection at a time."""
    await seed(community)
    await maintain(load_settings(database_url=community), lambda _: None)
    await assert_answers(community)


async def assert_answers(url: str) -> None:
    found = examples(PAGE.read_text(encoding="utf-8"))
    for each, output in zip(found, await answers(url, found), strict=True):
        assert output == each.output, each.code
