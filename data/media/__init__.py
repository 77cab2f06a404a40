"""Frames and sound of one media file, on one clock: every window holds what a linear decode shows and plays there."""

from data.media.media import Media, open_media
from data.media.sound import SAMPLE_RATE
from data.media.still import read_still

__all__ = ["SAMPLE_RATE", "Media", "open_media", "read_still"]
