"""Near-duplicates among any number of perceptual hashes, in little memory: blocks of all pairs, by matrix products."""

import numpy as np
from tqdm import tqdm

from .picture_rules import HASH_SIZE

BLOCK = 1024
FARTHER_THAN_ANY = HASH_SIZE**2 + 1


def signs(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32) packed hashes → ±1 of the even and of the odd columns of the frequencies, (N, 128) float32 each."""
    bits = np.unpackbits(hashes, axis=1).reshape(-1, HASH_SIZE, HASH_SIZE).astype(np.float32) * 2 - 1
    return bits[:, :, 0::2].reshape(len(bits), -1), bits[:, :, 1::2].reshape(len(bits), -1)


def differing_bits(these: tuple[np.ndarray, np.ndarray], those: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """
    In how many of the 256 bits the hashes differ, one picture of the two mirrored or not, whichever is less. (N, M)

    Mirroring turns the signs of the odd columns of a cosine transform. Training flips its pictures at random, so a
    mirrored copy is a copy.
    """
    even, odd = these[0] @ those[0].T, these[1] @ those[1].T  # agreeing minus differing bits: whole, so exact
    return (HASH_SIZE**2 - even - np.abs(odd)) / 2


def find_near_duplicates(
    hashes: np.ndarray, near_bits: int, related_bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Keep each picture that is not near a better one that is kept.

    Every copy is compared with the picture that stays in its stead, so a chain of small steps cannot lead from one
    drawing to another, as it would if all that hangs together were one group.

    Args:
        hashes (`np.ndarray` of shape `(N, 32)`): The packed perceptual hashes, the best picture first.
        near_bits (`int`): Up to how many differing bits a picture is a copy; -1 keeps all.
        related_bits (`int`): Up to how many differing bits two pictures that are kept are related.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: the number of the nearest better picture that is kept, (N,); in
        how many bits it differs, (N,); the pairs of related pictures that are kept, (P, 2).
    """
    nearest = np.full(len(hashes), -1)
    distance = np.full(len(hashes), FARTHER_THAN_ANY)
    kept = np.empty(0, int)
    related = [np.empty((0, 2), int)]
    with tqdm(total=len(hashes), desc="comparing", unit="picture") as progress:
        for start in range(0, len(hashes), BLOCK):
            block = slice(start, start + BLOCK)
            own = signs(hashes[block])
            pairs = []
            for first in range(0, len(kept), BLOCK):
                better = kept[first : first + BLOCK]
                bits = differing_bits(own, signs(hashes[better]))
                best = bits.argmin(axis=1)
                least = bits[np.arange(len(bits)), best]
                is_nearer = least < distance[block]
                nearest[block][is_nearer] = better[best[is_nearer]]
                distance[block][is_nearer] = least[is_nearer]
                rows, columns = np.nonzero(bits <= related_bits)
                pairs.append(np.stack([rows + start, better[columns]], axis=1))

            bits = differing_bits(own, own)
            for row in np.flatnonzero(distance[block] > near_bits):  # in order: the best picture of the block first
                if distance[start + row] > near_bits:  # still, after the better ones of its block
                    is_nearer = bits[row] < distance[block]
                    is_nearer[: row + 1] = False
                    nearest[block][is_nearer] = start + row
                    distance[block][is_nearer] = bits[row][is_nearer]
            pairs.append(np.argwhere(np.triu(bits <= related_bits, k=1)) + start)

            kept = np.concatenate([kept, start + np.flatnonzero(distance[block] > near_bits)])
            is_kept = np.isin(np.concatenate(pairs), kept).all(axis=1)
            related.append(np.concatenate(pairs)[is_kept])
            progress.update(len(bits))
    return nearest, distance, np.concatenate(related)


def families(number: int, related: np.ndarray) -> np.ndarray:
    """Label the pictures 0 … number - 1 so that those which the pairs connect, also by way of others, are equal."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(related)), (related[:, 0], related[:, 1])), shape=(number, number))
    return connected_components(links, directed=False)[1]
