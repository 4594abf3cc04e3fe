"""torchrun's environment variables: broken ones are named."""

import pytest

from unite_fast.distributed.environment import Environment, check_address, read_environment
from unite_fast.errors import UserError

RIGHT = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables to `RIGHT`, except those given; None removes one."""

    def change(**changes: str | None) -> None:
        for name, value in (RIGHT | changes).items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return change


def test_the_variables_of_torchrun_are_read(environment):
    environment()
    check_address()
    assert read_environment() == Environment(3, 4, 1, 2)
    environment(LOCAL_WORLD_SIZE=None)  # of another launcher
    assert read_environment() == Environment(3, 4, 1, 1)
    # A process alone is rank 0, whatever a shell inherited.
    for world in (None, "1"):
        environment(WORLD_SIZE=world, RANK="x", LOCAL_RANK=None)
        assert read_environment() == Environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "x"),
        ("WORLD_SIZE", ""),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "-4"),
        ("WORLD_SIZE", "4.0"),
        ("WORLD_SIZE", "1_0"),
        ("WORLD_SIZE", "9" * 5000),
        ("RANK", "4"),
        ("RANK", "-1"),
        ("RANK", None),
        ("RANK", " 3"),
        ("RANK", "\N{ARABIC-INDIC DIGIT THREE}"),
        ("LOCAL_RANK", None),
        ("LOCAL_RANK", "2"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("LOCAL_WORLD_SIZE", "5"),
        ("MASTER_PORT", "rubbish"),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", None),
        ("MASTER_ADDR", None),
    ],
)
def test_a_broken_variable_is_named(environment, name, value, mentions):
    environment(**{name: value})
    with pytest.raises(UserError, match=mentions(name, "torchrun")) as caught:
        read_environment()
        check_address()
    assert len(str(caught.value)) < 300
