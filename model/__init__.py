"""The joint video-audio transformer and its mathematics: plain torch, knows no mesh, no config file, no trainer."""
