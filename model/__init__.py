"""The joint video-audio transformer and its mathematics: plain torch, independent of meshes, config files and the
trainer."""
