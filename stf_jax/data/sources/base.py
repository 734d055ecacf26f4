"""What a data source is: a function that opens the data sets that a run trains on.

A data source is a function in a file of this folder, or in your own, named in a config as ``package.module:function``:

    class Mine:
        name = "my data"                     # in messages

        def __len__(self): ...               # number of records
        def __getitem__(self, index): ...    # Record (data/records.py)

    def open_mine(config):                   # TrainConfig -> one or several data sets
        return [Mine(...)]

Several data sets are concatenated; ``data.mix`` says how often an epoch takes each. A data set may also have ``cells``,
S, if all its records have labels of S×S cells per image, for ``model.cells``.

Resume is exact, and all hosts plan the same rows, because an index always gives the same record. Randomness must
therefore follow from ``config.seed`` and the index.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from stf_jax.config import TrainConfig, UserError
from stf_jax.data.records import Record
from stf_jax.registry import Registry


class DataNotNamed(UserError):
    """The config does not say where the data are. ``stf_jax.plan`` then takes their number from ``data.records``."""


@runtime_checkable
class DataSet(Protocol):
    """A sequence of records of random access, read by several threads at once.

    Attributes:
      name: what messages call it.
    """

    name: str

    def __len__(self) -> int:
        """The number of records."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Returns the record with that index, from 0, without opening its images.

        Raises:
          BadRow: the record cannot be used. It is left out and counted; so is one whose images raise it when opened.
        """
        ...


class DataSource(Protocol):
    """A function that opens data sets."""

    def __call__(self, config: TrainConfig) -> Sequence[DataSet]:
        """Opens the data sets of a run, before anything is written.

        Args:
          config: one stage of a run; a data source reads ``config.seed`` and what it needs of ``config.data``.

        Raises:
          UserError: the data or the config cannot be used.
          DataNotNamed: the config does not say where the data are.
        """
        ...


SOURCES: Registry[DataSource] = Registry("data.source", "stf_jax.data.sources")


def find_source(name: str) -> DataSource:
    """The data source of that name. Raises UserError for an unknown name, or something that is not a function."""
    found = SOURCES.find(name)
    if isinstance(found, type) or not callable(found):
        raise UserError(f"data.source={name} is not a function that opens data sets.")
    return found


def open_data_sets(config: TrainConfig) -> Sequence[DataSet]:
    """Opens the data sets of a config: at least one, none of them empty.

    Raises:
      UserError: as :class:`DataSource` and :func:`find_source`, or the source returns something else.
    """
    name = config.data.source
    data_sets = find_source(name)(config)
    if not isinstance(data_sets, (list, tuple)) or not all(isinstance(data_set, DataSet) for data_set in data_sets):
        raise UserError(f"data.source={name} must return a list of data sets with name, __len__ and __getitem__.")
    if not data_sets or not all(len(data_set) for data_set in data_sets):
        raise UserError(f"data.source={name} opens a data set without records.")
    return data_sets
