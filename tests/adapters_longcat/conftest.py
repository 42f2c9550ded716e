"""The tiny folder of LongCat-Video."""

from family_fixtures import longcat_folder

__all__ = ["longcat_folder"]
