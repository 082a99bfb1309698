"""Result: a complete run folder, and what Python does with it.

    run = prism_select.Run("folder")      run.scores    run.manifest    run.report()
    run.selected_dataset()                the chosen rows, with the pool's own columns and types

Choices made here:
- rows of a Dataset, a Parquet file or a hub data set keep their Arrow types; JSON and CSV rows get
  those that `datasets` infers from them;
- a run without `out=` lives in a temporary folder for as long as its `Run` does.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from prism_select.data.files import rows_at
from prism_select.data.object_rows import table_at
from prism_select.data.table_rows import arrow_table_at, parquet_table_at, table_of
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run as RunFiles
from prism_select.run.objects import in_reach, is_object

if TYPE_CHECKING:
    import datasets

__all__ = ["Run"]

CHOSEN = ("selected", "kept")


class Run(RunFiles):
    """A complete run folder. `objects` are the rows and the model that it was made from, where
    these were given as Python objects. Raises BadOption where there is no complete run."""

    def __init__(self, path: str | Path, objects: Mapping[str, Any] | None = None) -> None:
        super().__init__(Path(path))
        self.objects = dict(objects or {})
        if not (self.path / "manifest.json").exists():
            raise BadOption(f"{path}: no complete run there; give the folder of one")

    def report(self) -> Path:
        """Makes RUN/report.html again and returns its path."""
        from prism_select.report.run_page import write_report

        with in_reach(self.objects):
            return write_report(str(self.path), None)

    def selected_dataset(self) -> "datasets.Dataset":
        """The selected rows (of a repair: the kept ones) in the order of the pool, with the columns
        and types of the pool. Raises BadOption without the package datasets, or where files of the
        pool have columns that do not fit together."""
        try:
            import datasets
        except ImportError as error:
            raise BadOption(
                "selected_dataset needs the package datasets; pip install 'prism-select[hub]'"
            ) from error
        try:
            with in_reach(self.objects):
                tables = [rows_of_file(*chosen) for chosen in self._chosen_by_file()]
            if tables:
                return datasets.concatenate_datasets([datasets.Dataset(table) for table in tables])
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            raise BadOption(
                f"{self.path}: columns of the pool mix types ({error}); read selected.jsonl instead"
            ) from error
        raise BadOption(f"{self.path}: no row was chosen")

    def _chosen_by_file(self) -> Iterator[tuple[str, Sequence[int]]]:
        """Each file of the pool with the positions of its chosen rows, from 0 in the file."""
        table = self.columns("row", "file", "verdict")
        rows, files = table["row"].to_numpy(), table["file"].to_pylist()
        chosen = np.isin(table["verdict"].to_numpy(zero_copy_only=False), CHOSEN)
        names = np.array(files, dtype=object)
        for file in dict.fromkeys(files):
            in_file = names == file
            positions = rows[in_file & chosen] - rows[in_file].min()
            if len(positions):
                yield file, positions.tolist()


def rows_of_file(file: str, positions: Sequence[int]) -> pa.Table:
    """Rows of one file or object as an Arrow table, with the types they have there."""
    if is_object(file):
        return table_at(file, positions)
    if file.startswith("hub:"):
        import datasets

        name, _, split = file.removeprefix("hub:").partition(":")
        rows = datasets.load_dataset(name, split=split or "train").select(positions)
        return rows.with_format("arrow")[:]
    if file.lower().endswith(".parquet"):
        return parquet_table_at(file, positions)
    if file.lower().endswith(".arrow"):
        return arrow_table_at(file, positions)
    return table_of([raw.fields or {} for _, raw in rows_at(file, positions)])
