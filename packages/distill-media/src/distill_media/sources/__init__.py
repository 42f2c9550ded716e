"""From what people hold to one list of items: folders, tables, tars, lists of prompts."""

from distill_media.sources.reading import read_items

__all__ = ["read_items"]
