"""python -m tests.train.monitor.wandb_writer RUN FIRST END [hang] [valid]: a run's steps FIRST..END, W&B online beside
it."""

import json
import sys
import time
from pathlib import Path

from core.run_dir import RunDir
from train.monitor.wandb_log import WandbLog


def main() -> None:
    root, first, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    log = WandbLog(RunDir(root), "online", "mova", {"steps": 20}, {"layout": {"ranks": "1 on cpu"}})
    log.begin()
    with open(root / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step in range(first, end):
            file.write(json.dumps({"step": step, "train/loss": 1 / (step + 1)}) + "\n")
        if "valid" in sys.argv:
            file.write(json.dumps({"step": end, "valid/loss": float(end)}) + "\n")
    print("written", flush=True)
    if "hang" in sys.argv:
        time.sleep(600)
    log.alert(f"{root.name}: finished", f"after {end} steps", "INFO")
    log.close()


if __name__ == "__main__":
    main()
