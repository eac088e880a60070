"""The description that a store gives of itself, read and checked before anything is opened."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from negmaml.sweeps.guard import ROOT
from negmaml.sweeps.layout import Layout, as_held, layouts
from negmaml.sweeps.manifest import Manifest
from negmaml.sweeps.storage import StoreError, files_of
from negmaml.sweeps.untrusted import MOST_TEXT, check_attributes, checked_manifest, parsed

MANIFEST = "negmaml_sweep"
REMEDY = "; give an empty or new path, or the store of an earlier sweep"


@dataclass(frozen=True)
class Held:
    """The checked description of a store: its attributes, its sweep, and its arrays."""

    attributes: dict[str, Any]
    manifest: Manifest
    layouts: Mapping[str, Layout]


def existing(url: str) -> Held:
    """The description of the store at `url`; FileNotFoundError for a missing store."""
    held = held_at(url, files_of(url))
    if held is None:
        raise FileNotFoundError(f"there is no store at {url!r}")
    return held


def held_at(url: str, files) -> Held | None:
    """The description of a store; None for a missing one. StoreError if it is not of a sweep."""
    text = files.read(ROOT, MOST_TEXT)
    if text is None:
        return None
    try:
        root = parsed(text, ROOT)
        if not isinstance(root, dict):
            raise ValueError(f"{ROOT} is no table")
        attributes, arrays = root.get("attributes", {}), root.get("consolidated_metadata")
        if MANIFEST not in attributes or not arrays:
            raise StoreError(f"store {url!r} is a zarr store, but of no sweep{REMEDY}")
        if root.get("zarr_format") != 3:
            raise ValueError(f"it has the zarr format {root.get('zarr_format')!r:.20}")
        check_attributes(attributes)
        manifest = checked_manifest(attributes[MANIFEST])
        found = _held_layouts(manifest, arrays["metadata"])
        _check_own(files, found)
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise StoreError(f"store {url!r} cannot be read ({error}){REMEDY}") from error
    return Held(dict(attributes), manifest, found)


def _held_layouts(manifest: Manifest, metadata: Mapping[str, Any]) -> dict[str, Layout]:
    """The arrays as the group has them; ValueError for one that the sweep does not have."""
    wanted = layouts(manifest)
    if strange := sorted(map(str, metadata.keys() ^ wanted.keys())):
        raise ValueError(f"its arrays are not those of its sweep, which differ in {strange[:3]}")
    return {name: as_held(layout, metadata[name]) for name, layout in wanted.items()}


def _check_own(files, arrays: Mapping[str, Layout]) -> None:
    """Check the metadata of each array, which may be of a shape before the last extension."""
    for name, layout in arrays.items():
        text = files.read(f"{name}/{ROOT}", MOST_TEXT)
        try:
            own = json.loads(text or b"")
        except (ValueError, RecursionError):  # never used, and written anew by the next sweep
            continue
        if isinstance(own, dict) and _earlier(own.get("shape"), layout.shape):
            own["shape"] = list(layout.shape)
        as_held(layout, own)


def _earlier(shape: Any, now: tuple[int, ...]) -> bool:
    """Whether an array could have had the shape before it was extended, or gets it now."""
    return isinstance(shape, list) and len(shape) == len(now) and all(type(n) is int for n in shape)
