"""TODO."""

from collections.abc import Mapping

__all__ = ["NearDuplicates", "UnreadText"]


class UnreadText(LookupError):
    """A row came up whose text was not among those that were read."""


class NearDuplicates:
    """Says of each row, in the order asked, whether a row taken before is `threshold` similar or
    more.

    Similarity: share of common runs of three words (Jaccard), estimated by MinHash with 128
    permutations (Broder 1997; standard error at most 0.045)."""

    def __init__(self, threshold: float, texts: Mapping[int, str]) -> None:
        from datasketch import MinHash, MinHashLSH

        self.threshold, self.texts = threshold, texts
        self._new = MinHash
        self._index = MinHashLSH(
            threshold=min(threshold, 0.9), num_perm=128
        )  # what it finds is compared below
        self._taken: dict[int, MinHash] = {}

    def __call__(self, row: int) -> bool:
        if row not in self.texts:
            raise UnreadText(row)
        words = self.texts[row].lower().split()
        sketch = self._new(num_perm=128)
        sketch.update_batch(
            [" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))]
        )
        for other in self._index.query(sketch):
            if self._taken[other].jaccard(sketch) >= self.threshold:
                return True
        self._taken[row] = sketch
        self._index.insert(row, sketch)
        return False
