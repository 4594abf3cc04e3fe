"""What a run records about its training data, to notice other data when it resumes."""

from dataclasses import asdict, dataclass

from unite_fast.data_pipeline import Source
from unite_fast.distributed.hosts import name_ranks
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import CommonError, UserError, shown
from unite_fast.utils.parse_json import check_kind

KEY = "data"
"""Key of the record in a checkpoint's progress, and the word for `--allow-change`."""
CHANGES = "changes"
"""Key of the list of changes that the user allowed."""


@dataclass(frozen=True)
class DataRecord:
    """
    Attributes:
        samples: number of images.
        classes: name and number of images of each class, in the order of the labels.
        listing: hash of the listing, see `Source.fingerprint`.
    """

    samples: int
    classes: list[tuple[str, int]]
    listing: str

    def tree(self) -> dict:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, source: Source, ranks: Ranks) -> "DataRecord":
        """
        Raises:
            CommonError: a rank has other data than rank 0.
        """
        records = ranks.run_on_all(lambda: cls._of_own(source))
        for rank, record in enumerate(records):
            if difference := record.difference(records[0]):
                where = f"{name_ranks([rank])} has other training data than {name_ranks([0])}"
                raise CommonError(f"{where}: {difference}; copy them again")
        return records[0]

    @classmethod
    def _of_own(cls, source: Source) -> "DataRecord":
        # Bytes of names that are not text become question marks, as when a record is read.
        names = [name.encode("utf-8", "replace").decode() for name in source.class_names]
        classes = list(zip(names, source.class_counts(), strict=True))
        return cls(len(source), classes, source.fingerprint())

    @classmethod
    def of_tree(cls, tree: dict) -> "DataRecord":
        """
        Raises:
            UserError: not what `tree` returns.
        """
        try:
            return check_kind(cls, tree)
        except ValueError as error:
            raise UserError(f"the checkpoint's record of its training data cannot be read: {error}") from error

    def difference(self, before: "DataRecord") -> str:
        """What differs from `before`, in a few words; empty if nothing does."""
        if len(self.classes) != len(before.classes):
            return f"{len(self.classes)} classes instead of {len(before.classes)}"
        pairs = zip(self.classes, before.classes, strict=True)
        for label, ((name, count), (old, old_count)) in enumerate(pairs):
            if name != old:
                return f"class {label} is {shown(name)} instead of {shown(old)}"
            if count != old_count:
                return f"class {shown(name)} has {count} images instead of {old_count}"
        if self.samples != before.samples:
            return f"{self.samples} images instead of {before.samples}"
        return "" if self.listing == before.listing else f"other names or contents among the {self.samples} images"


def check_same_data(progress: dict, now: DataRecord, step: int, allowed: bool) -> tuple[list[dict], str]:
    """Compare the data of a resumed run with the record in its checkpoint.

    Args:
        progress: of the checkpoint.
        step: of the checkpoint.
        allowed: go on with other data, as the user said.

    Returns:
        The run's changes so far, to be stored in its next checkpoints; and a line to print, or an empty one.

    Raises:
        UserError: other data, and not `allowed`; or the record cannot be read.
    """
    try:
        changes = check_kind(list[dict], progress.get(CHANGES, []))
    except ValueError as error:
        raise UserError(f"the checkpoint's record of changes of its data cannot be read: {error}") from error
    if KEY not in progress:
        return changes, "the checkpoint is of an earlier version and does not record its data, so they are not compared"
    before = DataRecord.of_tree(progress[KEY])
    difference = now.difference(before)
    if not difference:
        return changes, ""
    if not allowed:
        raise UserError(
            f"cannot resume: the training data changed: {difference}; restore them, or add --allow-change {KEY}"
        )
    change = {"step": step, "key": KEY, "difference": difference, "before": before.listing, "after": now.listing}
    return [*changes, change], f"other data from step {step + 1} on: {difference}"
