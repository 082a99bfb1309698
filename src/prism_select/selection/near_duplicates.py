"""Near-duplicates: does a row repeat one that was selected before it?

    similarity = |A ∩ B| / |A ∪ B|    A, B: the runs of three words of two texts (Jaccard)

Choices made here:
- the similarity is estimated by MinHash with 128 permutations (Broder 1997); its standard error is
  at most 0.045;
- words are runs of characters without spaces, in lower case; a text of fewer than three words is
  one run.
"""

import random
from collections.abc import Mapping

__all__ = ["NearDuplicates", "UnreadText"]


class UnreadText(LookupError):
    """A row whose text was not read."""


class NearDuplicates:
    """Says of each row whether its similarity to an earlier row is `threshold` or more.

    Earlier rows are those for which the answer was False. Raises UnreadText for a row without an
    entry in `texts`.
    """

    def __init__(self, threshold: float, texts: Mapping[int, str]) -> None:
        from datasketch import MinHash, MinHashLSH

        self.threshold, self.texts = threshold, texts
        self._minhash = MinHash
        # candidates come from the index; their similarity is computed below
        state = random.getstate()  # the index draws a name for itself
        self._index = MinHashLSH(threshold=min(threshold, 0.9), num_perm=128)
        random.setstate(state)
        self._earlier: dict[int, MinHash] = {}

    def __call__(self, row: int) -> bool:
        if row not in self.texts:
            raise UnreadText(row)
        words = self.texts[row].lower().split()
        hashes = self._minhash(num_perm=128)
        hashes.update_batch(
            [" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))]
        )
        for candidate in self._index.query(hashes):
            if self._earlier[candidate].jaccard(hashes) >= self.threshold:
                return True
        self._earlier[row] = hashes
        self._index.insert(row, hashes)
        return False
