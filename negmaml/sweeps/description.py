"""The description of a store in its metadata, checked before any array is opened."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from negmaml.sweeps.guard import ROOT
from negmaml.sweeps.layout import Layout, layouts, match_metadata
from negmaml.sweeps.manifest import Manifest
from negmaml.sweeps.storage import StoreError, storage_at
from negmaml.sweeps.untrusted import MAX_TEXT, check_attributes, parse_manifest, parsed

MANIFEST = "negmaml_sweep"
REMEDY = "; give an empty or new path, or the store of an earlier sweep"


@dataclass(frozen=True)
class StoreDescription:
    """The checked description of a store: its attributes, its sweep, and its arrays.

    Attributes are those of the dataset; the manifest describes the sweep; `layouts` has the
    layout of each array by name.
    """

    attributes: dict[str, Any]
    manifest: Manifest
    layouts: Mapping[str, Layout]


def description_of(url: str) -> StoreDescription:
    """The description of the store at `url`; FileNotFoundError for a missing store."""
    held = read_description(url, storage_at(url))
    if held is None:
        raise FileNotFoundError(f"there is no store at {url!r}")
    return held


def read_description(url: str, files) -> StoreDescription | None:
    """The description of a store; None if it is missing, StoreError if it is not of a sweep."""
    # Bounded, because anybody may have written the file and parsing it takes memory.
    text = files.read(ROOT, MAX_TEXT)
    if text is None:
        return None
    try:
        root = parsed(text, ROOT)
        if not isinstance(root, dict):
            raise ValueError(f"{ROOT} is no table")
        attributes, arrays = root.get("attributes", {}), root.get("consolidated_metadata")
        # A zarr store of something else must not be overwritten.
        if MANIFEST not in attributes or not arrays:
            raise StoreError(f"store {url!r} is a zarr store, but of no sweep{REMEDY}")
        if root.get("zarr_format") != 3:
            raise ValueError(f"it has the zarr format {root.get('zarr_format')!r:.20}")
        check_attributes(attributes)
        manifest = parse_manifest(attributes[MANIFEST])
        found = _held_layouts(manifest, arrays["metadata"])
        _check_own(files, found)
    # StoreError is a ValueError; without this clause it would be wrapped again below.
    except StoreError:
        raise
    # Any malformed metadata ends here as one error with a remedy.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise StoreError(f"store {url!r} cannot be read ({error}){REMEDY}") from error
    return StoreDescription(dict(attributes), manifest, found)


def _held_layouts(manifest: Manifest, metadata: Mapping[str, Any]) -> dict[str, Layout]:
    """The layouts confirmed by the metadata of the group; ValueError for other arrays."""
    # The manifest determines all arrays.
    wanted = layouts(manifest)
    if strange := sorted(map(str, metadata.keys() ^ wanted.keys())):
        raise ValueError(f"its arrays are not those of its sweep, which differ in {strange[:3]}")
    return {name: match_metadata(layout, metadata[name]) for name, layout in wanted.items()}


def _check_own(files, arrays: Mapping[str, Layout]) -> None:
    """Check the metadata of each array; its shape may be that of before the last extension."""
    for name, layout in arrays.items():
        text = files.read(f"{name}/{ROOT}", MAX_TEXT)
        try:
            own = json.loads(text or b"")
        except (ValueError, RecursionError):
            # Only the copy in the group is used, and the next sweep writes this file again.
            continue
        if isinstance(own, dict) and _earlier(own.get("shape"), layout.shape):
            # An interrupted extension leaves the old shape here; everything else must agree.
            own["shape"] = list(layout.shape)
        match_metadata(layout, own)


def _earlier(shape: Any, now: tuple[int, ...]) -> bool:
    """True if an array could have had the shape before or during an extension."""
    return isinstance(shape, list) and len(shape) == len(now) and all(type(n) is int for n in shape)
